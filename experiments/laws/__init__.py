"""Scaling laws: from finished runs to a law of the loss, with intervals, to predictions that later runs are held to.

`points` reads runs, `form` has the law and its fit, `ways` the three ways to the best size for a budget, `resampling` gives
intervals, `forecast` writes predictions down and judges them, `gain` asks how what a gate wins moves with scale.
`experiments.scale` is the command.
"""
