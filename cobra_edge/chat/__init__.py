"""A conversation about images with one session, and the terminal it is held in."""
