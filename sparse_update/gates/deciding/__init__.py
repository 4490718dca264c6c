"""The gate that decides while it trains whether gating pays: what it observes, what it tries, what it judges by."""
