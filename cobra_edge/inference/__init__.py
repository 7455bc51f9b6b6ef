"""A bundle that answers: sessions, generation, and the options that all commands share."""
