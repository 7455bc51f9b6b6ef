"""What `cobra-edge bench` measures. Results are JSON under bench/results, tables and plots are made from them."""

from .verbs import command

__all__ = ["command"]
