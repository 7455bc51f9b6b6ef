"""Doctor: what this machine can run, and why not."""
