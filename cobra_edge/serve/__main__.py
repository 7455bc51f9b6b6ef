"""`python -m cobra_edge.serve`."""

from .command import main

if __name__ == "__main__":
    main()
