"""Errors for users, each with its exit code.

0 done; 1 drift budget exceeded; 2 bad input or usage; 3 something this machine lacks; 130 interrupted.
"""

from __future__ import annotations


class CobraEdgeError(Exception):
    """Base class of errors that a user can fix; the message says what was got, what was expected, what to do."""

    exit_code = 2


class InputError(CobraEdgeError):
    """An invalid file, name or option."""


class BundleError(InputError):
    """A bundle is incomplete, altered or of another version."""


class CheckpointError(InputError):
    """A checkpoint is unreadable, malicious, or does not fit its config."""


class MachineError(CobraEdgeError):
    """The machine lacks a library, memory, disk space or a device."""

    exit_code = 3


class DeviceLostError(MachineError):
    """A device failed so that this process cannot use it any more; a new process perhaps can."""


class DriftError(CobraEdgeError):
    """The drift of a quantized model exceeds its budget."""

    exit_code = 1
