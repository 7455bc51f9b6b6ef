"""The compiled kernels on a GPU: the image of kernels.xz that its driver takes, as a module."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .calls import CudaError, call
from .library import Image, Refused, read_kernels

if TYPE_CHECKING:
    from .device import Gpu

log = logging.getLogger(__name__)


def load_module(gpu: Gpu) -> Any:
    """Return the driver's module of the kernels.

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

    return read_kernels().load(gpu.capability, load, title=gpu.name, integrated=gpu.integrated)
