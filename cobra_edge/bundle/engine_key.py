"""What an engine was built from and for: part of the manifest, and the name of a file in the engine cache."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import msgspec

from ..errors import InputError
from ..formats.precision import PrecisionName

# What may become part of a file's name, and is shown: keys are read from files that others wrote.
_FORMS = {
    "version": re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,31}"),
    "capabilities": re.compile(r"\d{1,2}\.\d"),
    "onnx_sha256": re.compile(r"[0-9a-f]{64}"),
}


_CAPABILITIES_MOST = 32


_GPU_LETTERS_MOST = 300


RuntimeName = Literal["tensorrt", "tensorrt-rtx"]


class EngineKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine was built from and for.

    Attributes:
        runtime: "tensorrt" or "tensorrt-rtx".
        version: of the library that built it, such as "10.3.0"; another version does not read it.
        capabilities: CUDA compute capabilities it runs on, such as ("8.6", "8.9").
        precision: of the graph, a name of `precision.PRECISIONS`.
        onnx_sha256: over the graph and its external data, as `onnx_digest` makes it.
        stripped: whether the weights were left out, to be taken from the graph when the engine is opened.
        gpu: name and size of the one GPU it was timed on; empty where it is as good on any GPU of its capabilities.
    """

    runtime: RuntimeName
    version: str
    capabilities: tuple[str, ...]
    precision: PrecisionName
    onnx_sha256: str
    stripped: bool = False
    gpu: str = ""

    def __post_init__(self) -> None:
        """Raise InputError for a field that is no such thing."""
        named = [
            ("version", self.version),
            *(("capabilities", c) for c in self.capabilities),
            ("onnx_sha256", self.onnx_sha256),
        ]
        odd = [f"{name} {value[:80]!r}" for name, value in named if not _FORMS[name].fullmatch(value)]
        if odd:
            raise InputError(f"engine key: {odd[0]} is no such thing; export or build it again")
        if not 1 <= len(self.capabilities) <= _CAPABILITIES_MOST or len(self.gpu) > _GPU_LETTERS_MOST:
            raise InputError(
                f"engine key: {len(self.capabilities)} capabilities for a GPU of {len(self.gpu)} letters; build it again"
            )

    @property
    def stem(self) -> str:
        """File name without suffix: readable, and different wherever any field is."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
        arch = "-".join("sm" + c.replace(".", "") for c in self.capabilities)
        return f"vision-{self.runtime}-{self.version}-{arch}-{self.precision}-{digest}"
