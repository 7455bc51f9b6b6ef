"""The laboratory: contests with peers, planted faults, interval coverage, tuning, predictions, figures. Not installed.

Run from a checkout: `python -m bench.quality`, `python -m bench.figures` and so on.
"""
