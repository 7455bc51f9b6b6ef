"""The compiled kernels on a GPU: the image of kernels.xz that its driver takes, as a module."""

from __future__ import annotations

from typing import Any

from .calls import CudaError, call
from .library import Image, Refused, read_kernels


def load_module(capability: tuple[int, int], *, title: str, integrated: bool) -> Any:
    """Return the driver's module of the kernels, on the GPU that this thread's calls go to.

    Args:
        capability: its compute capability, such as (8, 7).
        title: what a person calls it.
        integrated: whether its memory is the host's.

    Raises:
        MachineError: this installation has no kernels, or damaged ones; the GPU or its driver takes none of them, what is
            needed is said.
    """

    def load(image: Image) -> Any:
        try:
            return call(f"loading the kernels {image}", "cuModuleLoadData", image.data)
        except CudaError as error:
            if error.refuses_image:
                raise Refused(error.name) from error
            raise

    return read_kernels().load(capability, load, title=title, integrated=integrated)
