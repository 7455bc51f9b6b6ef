"""`python -m cobra_edge.export`."""

from .command import main

if __name__ == "__main__":
    main()
