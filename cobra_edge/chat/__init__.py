"""A conversation about pictures with one session, and the terminal it is held in."""
