"""`python -m cobra_edge.calibrate`."""

from .command import main

if __name__ == "__main__":
    main()
