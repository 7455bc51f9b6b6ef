"""What `cobra-edge bench` measures of a bundle on this machine. Results are JSON under bench/results."""
