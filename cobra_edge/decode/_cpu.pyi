"""Type stubs of the native module, whose source is runtimes/cpu/module.cpp."""

from typing import Any

import numpy as np

kernels: Any  # one function per kernel, for tests and measurements

def kernel_names() -> list[str]: ...

class Decoder:
    kernels: str
    threads: int
    def __init__(
        self, sizes: dict[str, Any], tensors: dict[str, np.ndarray], kernels: str, threads: int, int8_activations: bool
    ) -> None: ...
    def embed(self, tokens: np.ndarray) -> np.ndarray: ...
    def forward(self, embeddings: np.ndarray, conv: np.ndarray, ssm: np.ndarray, every_position: bool) -> np.ndarray: ...
