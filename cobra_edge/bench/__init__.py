"""`cobra-edge bench`: speed and memory of a bundle on this machine. Results are JSON under bench/results."""
