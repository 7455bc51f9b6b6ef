"""The key of an engine: part of the manifest, and the file name in the engine cache."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import msgspec

from ..errors import InputError
from ..formats.precision import PrecisionName

# Fields that become part of a file name and are printed; keys are read from untrusted files.
_FORMS = {
    "version": re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,31}"),
    "capabilities": re.compile(r"\d{1,2}\.\d"),
    "onnx_sha256": re.compile(r"[0-9a-f]{64}"),
}


_CAPABILITIES_MOST = 32


_GPU_LETTERS_MOST = 300


RuntimeName = Literal["tensorrt", "tensorrt-rtx"]


class EngineKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Identifies an engine by library, GPUs, precision and graph.

    Attributes:
        runtime: "tensorrt" or "tensorrt-rtx".
        version: of the library that built it, such as "10.3.0"; other versions cannot read it.
        capabilities: CUDA compute capabilities it runs on, such as ("8.6", "8.9").
        precision: of the graph, a name of `precision.PRECISIONS`.
        onnx_sha256: hash over the graph and its external data, see `onnx_digest`.
        stripped: whether weights were omitted, to be restored from the graph when the engine is opened.
        gpu: name and size of the GPU whose timings it uses; empty if it was not tuned for one GPU.
    """

    runtime: RuntimeName
    version: str
    capabilities: tuple[str, ...]
    precision: PrecisionName
    onnx_sha256: str
    stripped: bool = False
    gpu: str = ""

    def __post_init__(self) -> None:
        """Raise InputError for an invalid field."""
        named = [
            ("version", self.version),
            *(("capabilities", c) for c in self.capabilities),
            ("onnx_sha256", self.onnx_sha256),
        ]
        odd = [f"{name} {value[:80]!r}" for name, value in named if not _FORMS[name].fullmatch(value)]
        if odd:
            raise InputError(f"engine key: invalid {odd[0]}; export or build it again")
        if not 1 <= len(self.capabilities) <= _CAPABILITIES_MOST or len(self.gpu) > _GPU_LETTERS_MOST:
            raise InputError(
                f"engine key: {len(self.capabilities)} capabilities, expected 1 to {_CAPABILITIES_MOST}, and a GPU name of "
                f"{len(self.gpu)} letters, expected at most {_GPU_LETTERS_MOST}; build it again"
            )

    @property
    def stem(self) -> str:
        """File name without suffix: readable, and different for different keys."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
        arch = "-".join("sm" + c.replace(".", "") for c in self.capabilities)
        return f"vision-{self.runtime}-{self.version}-{arch}-{self.precision}-{digest}"
