"""`python -m cobra_edge COMMAND`."""

from .cli import main

main()
