"""The bundle: one directory that a device can run, checked before it is trusted."""
