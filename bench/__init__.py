"""The laboratory: benchmarks of the project itself. Not installed.

Run in a checkout: `python -m bench` lists the commands, `python -m bench.quality` runs one.
"""
