"""What every command shares: output, progress and exit codes, usage errors, suggestions."""
