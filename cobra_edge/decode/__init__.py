"""The Mamba decoder at run time: one module per backend, and the table that selects one."""
