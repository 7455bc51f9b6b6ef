"""The process and its environment: threads, library telemetry, optional dependencies."""
