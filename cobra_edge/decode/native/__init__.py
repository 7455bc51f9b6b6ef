"""The native decoder's library (runtimes/cpu), called through its C interface by ctypes: one library serves every Python."""
