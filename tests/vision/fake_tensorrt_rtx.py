"""A fake of the part of TensorRT for RTX's run time that this package uses, on a fake GPU (fake_cuda).

It does not model speed or numbers; it checks the order of calls. Work on a stream is done when the stream is synchronized and
not before; using freed memory, or an input or output without an address, fails. An engine runs as `FakeTensorRT.function`, and
can be opened if its bytes are among `FakeTensorRT.engines`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ..fake_cuda import FakeCuda

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="needs pip install '.[rtx]'")


@dataclass
class FakeTensorRT:
    """tensorrt_rtx's run time; everything else is the real library's."""

    cuda: FakeCuda
    inputs: dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype of each
    outputs: dict[str, tuple[tuple[int, ...], Any]]
    function: Callable[[np.ndarray], np.ndarray]
    engines: list[bytes] | None = None  # None: any
    opened: list[bytes] = field(default_factory=list)
    compiled: bytes = b"kernels"
    caches: list[tuple[bytes, bool]] = field(default_factory=list)  # offers to a runtime cache, and whether accepted
    fails: bool = False

    def module(self, version: str = tensorrt_rtx.__version__) -> types.ModuleType:
        """Return the module for `import tensorrt_rtx`."""
        module = types.ModuleType("tensorrt_rtx")
        module.__dict__.update({k: v for k, v in tensorrt_rtx.__dict__.items() if not k.startswith("__")})
        module.__spec__ = ModuleSpec("tensorrt_rtx", None)
        module.__version__ = version
        module.Runtime = lambda logger: _Runtime(self, logger)
        return module


class _Runtime:
    def __init__(self, fake: FakeTensorRT, logger: Any) -> None:
        self.fake, self.logger = fake, logger

    def deserialize_cuda_engine(self, data):
        if self.fake.engines is not None and bytes(data) not in self.fake.engines:
            self.logger.log(tensorrt_rtx.ILogger.ERROR, "the magic tag does not match")
            return None
        self.fake.opened.append(bytes(data))
        return _Engine(self.fake, self.logger)


class _Engine:
    def __init__(self, fake: FakeTensorRT, logger: Any) -> None:
        self.fake, self.logger = fake, logger
        self.tensors = {**fake.inputs, **fake.outputs}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, i):
        return list(self.tensors)[i]

    def get_tensor_mode(self, name):
        return tensorrt_rtx.TensorIOMode.INPUT if name in self.fake.inputs else tensorrt_rtx.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        return self.tensors[name][0]

    def get_tensor_dtype(self, name):
        return {"float32": tensorrt_rtx.float32, "uint8": tensorrt_rtx.uint8}[np.dtype(self.tensors[name][1]).name]

    def create_runtime_config(self):
        return SimpleNamespace(
            create_runtime_cache=lambda: _RuntimeCache(self.fake), set_runtime_cache=lambda cache: setattr(self, "cache", cache)
        )

    def create_execution_context(self, _config):
        assert isinstance(self.cache, _RuntimeCache), "no runtime cache was set"
        self.cache.content = self.fake.compiled
        return _Context(self)


class _RuntimeCache:
    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake, self.content = fake, b""

    def deserialize(self, data):
        taken = bytes(data) == self.fake.compiled
        self.fake.caches.append((bytes(data), taken))
        return taken

    def serialize(self):
        return self.content


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.addresses = engine, {}

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address in self.engine.fake.cuda.memory

    def execute_async_v3(self, stream):
        fake = self.engine.fake
        missing = self.engine.tensors.keys() - self.addresses.keys()
        if missing or fake.fails or stream not in fake.cuda.streams:
            self.engine.logger.log(tensorrt_rtx.ILogger.ERROR, f"no address for {sorted(missing)}")
            return False
        fake.cuda.streams[stream].append(self._run)
        return True

    def _run(self) -> None:
        fake = self.engine.fake
        (taken, (shape, dtype)), (given, (out_shape, out_dtype)) = (*fake.inputs.items(), *fake.outputs.items())
        source = fake.cuda.memory[self.addresses[taken]].view(dtype).reshape(shape)
        fake.cuda.memory[self.addresses[given]].view(out_dtype).reshape(out_shape)[:] = fake.function(source)
