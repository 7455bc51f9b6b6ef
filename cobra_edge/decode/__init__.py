"""The Mamba decoder at run time: one module a backend, and the table that chooses."""
