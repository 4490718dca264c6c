"""Parts of the studies on learned rewards: demonstrators and annotators with stated flaws, a small policy, its training."""
