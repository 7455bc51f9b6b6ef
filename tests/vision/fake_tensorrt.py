"""A thin fake of the part of the TensorRT Python API that the package uses. It is not TensorRT.

Written from NVIDIA's published API documentation of 10.3 and its migration guide to 11. It raises `OrderError` if calls come in
an order that TensorRT does not allow, and is stricter than necessary: using an object whose parent is gone raises, although the
real bindings keep most parents alive. An "engine" holds the graph, the version and the compute capability; onnxruntime runs it
when the fake stream is synchronized (fake_cuda).

It can verify the order of calls, that refusals are reported, that engines and timing caches are stored, found, rejected and
rebuilt, that builds exclude each other and can be killed. It cannot verify that TensorRT accepts the graph, that the numbers
are right, how much memory and time it needs, its messages, or that real signatures match the documentation.

`install` fills a module named `tensorrt` with the API of a version: 10 has EXPLICIT_BATCH and precision flags, 11 does not, and
types every network strongly. Environment variables control the builder, for child processes of a test:
FAKE_BUILD = "" (build), "slow" (two seconds), "hang", "killed", "crash", "nothing";
FAKE_BUILDS = a file that gets one line per build.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
import os
import signal
import time
import weakref
from typing import Any

import numpy as np
import onnx
import onnxruntime

from .. import fake_cuda

MAGIC, TIMING_MAGIC = b"fake engine\n", b"fake times\n"


class OrderError(AssertionError):
    """Calls in an order, or with objects, that TensorRT does not allow."""


def need(condition: bool, rule: str) -> None:
    if not condition:
        raise OrderError(rule)


class Made:
    """An object made from others, which must outlive it."""

    def __init__(self, *parents: Any) -> None:
        self._parents = [(type(p).__name__, weakref.ref(p)) for p in parents]

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            for kind, parent in self._parents:
                need(parent() is not None, f"{type(self).__name__}.{name} was used after its {kind} was deleted")
        return super().__getattribute__(name)


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        self._bound = True

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        self._bound = True


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    UINT8 = 5


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class TimingCache(Made):
    def __init__(self, config: Config, content: bytes) -> None:
        super().__init__(config)
        self._content = content

    def serialize(self) -> HostMemory:
        return HostMemory(self._content)


class HostMemory(bytearray):
    """Like the real one, supports nothing but the buffer protocol."""


class Config(Made):
    def __init__(self, builder: Any, api: Any) -> None:
        super().__init__(builder)
        self._api, self._flags, self._limits, self._cache = api, {"TF32"}, {}, None
        self.progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        need(isinstance(pool, MemoryPoolType) and isinstance(size, int) and size > 0, "a limit is a positive number of bytes")
        self._limits[pool] = size

    def set_flag(self, flag: enum.Enum) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: enum.Enum) -> None:
        self._flags.discard(flag.name)

    def create_timing_cache(self, content: bytes) -> TimingCache | None:
        if content and not content.startswith(TIMING_MAGIC):
            return None
        return TimingCache(self, content or TIMING_MAGIC + f"{self._api.version} {fake_cuda.ENVIRONMENT.facts()[0]}\n".encode())

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        need(isinstance(cache, TimingCache), "a timing cache is made by create_timing_cache")
        made_by = cache._content.split(b"\n")[1].decode()
        if made_by != f"{self._api.version} {fake_cuda.ENVIRONMENT.facts()[0]}" and not ignore_mismatch:
            return False
        self._cache = cache
        return True


class Network(Made):
    def __init__(self, builder: Any, typed: bool) -> None:
        super().__init__(builder)
        self._typed, self._graph = typed, None


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser(Made):
    def __init__(self, network: Network, logger: ILogger) -> None:
        need(isinstance(network, Network) and isinstance(logger, ILogger), "a parser takes a network and a logger")
        super().__init__(network, logger)
        self._network, self._errors = weakref.ref(network), []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        network = self._network()
        need(network._graph is None, "a network is parsed into once")
        with open(path, "rb") as file:
            content = file.read()
        try:
            onnx.load_from_string(content)
        except Exception as error:
            self._errors.append(ParserError(f"not an ONNX graph: {error}"))
            return False
        network._graph = content
        return True


class Builder(Made):
    _api: Any = None

    def __init__(self, logger: ILogger) -> None:
        need(getattr(logger, "_bound", False), "a builder takes a logger whose base was initialised")
        super().__init__(logger)
        self._logger = weakref.ref(logger)

    def create_network(self, flags: int = 0) -> Network:
        known = sum(1 << int(f) for f in self._api.NetworkDefinitionCreationFlag)
        need(flags & ~known == 0, f"unknown flags {flags:#x}")
        typed = getattr(self._api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        asked = typed is not None and flags & (1 << int(typed))
        return Network(self, bool(asked) or self._api.major >= 11)

    def create_builder_config(self) -> Config:
        return Config(self, self._api)

    def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
        need(network._parents[0][1]() is self and config._parents[0][1]() is self, "network and config are another builder's")
        need(network._graph is not None, "nothing was parsed into the network")
        need(MemoryPoolType.WORKSPACE in config._limits, "the workspace is not limited: it would take the whole GPU")
        monitor = config.progress_monitor
        need(getattr(monitor, "_bound", False), "the progress monitor's base was not initialised")
        problem = self._problem(network, config)
        if problem is not None:
            self._logger().log(ILogger.ERROR, problem)
            return None
        known = config._cache._content.count(b"\n") - 2
        with open(os.environ["FAKE_BUILDS"], "a") as log:
            log.write(
                json.dumps({"pid": os.getpid(), "known": known, "workspace": config._limits[MemoryPoolType.WORKSPACE]}) + "\n"
            )
        if not self._work(monitor):
            return None
        config._cache._content += hashlib.sha256(network._graph).hexdigest().encode() + b"\n"
        head = {"version": self._api.version, "capability": fake_cuda.ENVIRONMENT.facts()[1]}
        return HostMemory(MAGIC + json.dumps(head).encode() + b"\n" + network._graph)

    @staticmethod
    def _problem(network: Network, config: Config) -> str | None:
        precisions = config._flags & {"FP16", "BF16", "INT8"}
        quantized = any(n.op_type == "QuantizeLinear" for n in onnx.load_from_string(network._graph).graph.node)
        if network._typed and precisions:
            return f"a strongly typed network takes no {', '.join(sorted(precisions))}"
        if quantized and not network._typed and "INT8" not in precisions:
            return "quantize layers need a strongly typed network or the flag INT8"
        return "no kernel fits the workspace" if os.environ.get("FAKE_BUILD") == "nothing" else None

    @staticmethod
    def _work(monitor: Any) -> bool:
        """Go through phases as TensorRT does: nested, and with some steps unreported."""
        monitor.phase_start("Building the engine", None, 2)
        goes_on = monitor.step_complete("Building the engine", 0)
        monitor.phase_start("Timing kernels", "Building the engine", 50)
        for name in ("a", "b"):
            monitor.phase_start(f"Timing {name}", "Timing kernels", 1)
            goes_on = goes_on and monitor.step_complete(f"Timing {name}", 0)
            monitor.phase_finish(f"Timing {name}")
        match os.environ.get("FAKE_BUILD"):
            case "slow":
                time.sleep(2)
            case "hang":
                time.sleep(600)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                os.write(2, b"fake: an illegal memory access\n")
                os.kill(os.getpid(), signal.SIGABRT)
        monitor.phase_finish("Timing kernels")
        monitor.phase_finish("Building the engine")
        return goes_on


class Runtime(Made):
    _api: Any = None

    def __init__(self, logger: ILogger) -> None:
        need(getattr(logger, "_bound", False), "a runtime takes a logger whose base was initialised")
        super().__init__(logger)
        self._logger = weakref.ref(logger)

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        if not content.startswith(MAGIC):
            self._logger().log(ILogger.ERROR, "the engine's magic tag is wrong")
            return None
        head, graph = content[len(MAGIC) :].split(b"\n", 1)
        for name, here in (("version", self._api.version), ("capability", fake_cuda.ENVIRONMENT.facts()[1])):
            if json.loads(head)[name] != here:
                self._logger().log(ILogger.ERROR, f"the engine's {name} is {json.loads(head)[name]}, expected {here}")
                return None
        return Engine(self, graph)


class Engine(Made):
    def __init__(self, runtime: Runtime, graph: bytes) -> None:
        super().__init__(runtime)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._io = {i.name: i for i in (*self._session.get_inputs(), *self._session.get_outputs())}

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        kinds = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(uint8)": DataType.UINT8}
        return kinds[self._io[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._io[name].shape)

    def create_execution_context(self) -> Context:
        return Context(self)


class Context(Made):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._engine, self._addresses = weakref.ref(engine), {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine()._io or address not in fake_cuda.memory:
            return False
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine()
        need(self._addresses.keys() == engine._io.keys(), "every input and output needs an address before it runs")
        need(stream_handle in fake_cuda.streams, "the stream was not made, or was given back")
        fake_cuda.streams[stream_handle].append(self._run)
        return True

    def _run(self) -> None:
        engine = self._engine()
        given = {i.name: self._device(engine, i.name).copy() for i in engine._session.get_inputs()}
        for output, value in zip(engine._session.get_outputs(), engine._session.run(None, given), strict=True):
            self._device(engine, output.name)[...] = value

    def _device(self, engine: Engine, name: str) -> np.ndarray:
        kind = {DataType.FLOAT: np.float32, DataType.UINT8: np.uint8, DataType.HALF: np.float16}[engine.get_tensor_dtype(name)]
        shape, address = engine.get_tensor_shape(name), self._addresses[name]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        need(address in fake_cuda.memory and fake_cuda.memory[address].nbytes == size, f"{name} has other memory than it needs")
        return np.frombuffer((ctypes.c_byte * size).from_address(address), kind).reshape(shape)


def install(module: dict[str, Any], version: str) -> None:
    """Fill the namespace of a module `tensorrt` with the API of a version."""

    class Api:
        pass

    api: Any = Api()
    api.version, api.major = version, int(version.split(".")[0])
    creation, flags = {"STRONGLY_TYPED": 1}, {"TF32": 7}
    if api.major < 11:
        creation["EXPLICIT_BATCH"] = 0
        flags |= {"FP16": 0, "INT8": 2, "BF16": 17}
    api.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", creation)
    module |= {
        "__version__": version,
        "NetworkDefinitionCreationFlag": api.NetworkDefinitionCreationFlag,
        "BuilderFlag": enum.Enum("BuilderFlag", flags),
        "Builder": type("Builder", (Builder,), {"_api": api}),
        "Runtime": type("Runtime", (Runtime,), {"_api": api}),
        **{k.__name__: k for k in (ILogger, IProgressMonitor, DataType, MemoryPoolType, OnnxParser)},
    }  # fmt: skip
