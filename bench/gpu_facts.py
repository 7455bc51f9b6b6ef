"""The GPU of this machine, as results name it."""

from __future__ import annotations

import msgspec

from cobra_edge.bench.decode_result import GpuFacts
from cobra_edge.bench.gpu import gpu_here


def gpu_facts() -> GpuFacts:
    """Return name, versions and sizes. Raises MachineError, with the reason, if there is no GPU."""
    return msgspec.convert(gpu_here().facts(), GpuFacts)
