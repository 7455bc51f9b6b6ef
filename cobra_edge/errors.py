"""The errors a user can meet, and the exit code of each.

0 done; 1 a drift budget was exceeded; 2 bad input or usage; 3 something this machine lacks; 130 interrupted.
"""

from __future__ import annotations


class CobraEdgeError(Exception):
    """Base of every error that is the user's to mend: what was got, what was expected, what to do."""

    exit_code = 2


class InputError(CobraEdgeError):
    """A file, a name or an option is not what was expected."""


class BundleError(InputError):
    """A bundle is incomplete, altered or from another version."""


class CheckpointError(InputError):
    """A checkpoint is unreadable, hostile, or does not fit its config."""


class MachineError(CobraEdgeError):
    """The machine lacks a library, memory, disk space or a device."""

    exit_code = 3


class DriftError(CobraEdgeError):
    """A quantized build drifted further from the float model than its budget allows."""

    exit_code = 1
