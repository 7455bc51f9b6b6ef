"""Files in general: atomic outputs, owners that are trusted, JSON and TOML with errors in our words, Git LFS pointers."""
