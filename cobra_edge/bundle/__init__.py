"""The artifact: one directory that a device can run, checked before a byte of it is trusted."""
