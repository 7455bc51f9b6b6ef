"""Suites and calibration sets: one line format, one reader, one tokenized form; scoring and published benchmarks."""
