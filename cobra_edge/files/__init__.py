"""Files: atomic writes, trusted ownership, JSON and TOML parsing, Git LFS pointers."""
