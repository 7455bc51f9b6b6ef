"""`python -m cobra_edge VERB`."""

from .cli import main

main()
