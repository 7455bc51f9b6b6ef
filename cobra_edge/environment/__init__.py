"""The process and its machine: threads, telemetry of libraries, how an extra is installed."""
