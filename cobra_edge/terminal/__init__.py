"""Shared by all commands: option groups, output, progress, exit codes, usage errors, suggestions."""
