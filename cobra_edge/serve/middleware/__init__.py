"""ASGI middleware: host check, API key, body limit, admission, metrics."""
