"""Calibrate: statistics of the inputs of every matrix product of a checkpoint."""
