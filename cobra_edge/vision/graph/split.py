"""Split a vision graph into encoders and projector, so that each can be run alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...bundle.reader import VISION, Bundle
from ...errors import MachineError
from ..session import INPUT, OUTPUT, open_on_cpu
from .emulation import write_emulated
from .onnx_export import feature_name


@dataclass(frozen=True, eq=False)
class SplitGraph:
    """Encoders and projector, run by onnxruntime on the CPU, with the rounding of 16-bit graphs emulated."""

    encoders: Any
    projector: Any
    names: Sequence[str]

    def features(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Return each encoder's features (1, n_patches, embed_dim) float32 for the result of `ImageTransform.pixels`."""
        return list(self.encoders.run(list(self.names), {INPUT: pixels}))

    def projected(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Return embeddings (n_visual_tokens, d_model) float32 for features, each (1, n_patches, embed_dim) float32."""
        embeddings: np.ndarray = self.projector.run([OUTPUT], dict(zip(self.names, features, strict=True)))[0]
        return embeddings[0]


@contextmanager
def open_split(bundle: Bundle) -> Iterator[SplitGraph]:
    """Split a bundle's graph and open both parts.

    Raises:
        MachineError: the graph cannot be split there, or is too large.
    """
    config, graph = bundle.manifest.model, bundle.vision_graph
    assert config.vision is not None
    names = [feature_name(i) for i in range(len(config.vision.encoders))]
    with tempfile.TemporaryDirectory() as folder:
        whole = bundle.graph_file()
        try:
            if graph.precision in ("fp16", "bf16"):
                for name in bundle.graph_files:
                    (Path(folder) / name).symlink_to(bundle.path(name).absolute())
                write_emulated(Path(folder) / VISION, Path(folder) / "whole.onnx")
                whole = Path(folder) / "whole.onnx"
            files = [Path(folder) / "encoders.onnx", Path(folder) / "projector.onnx"]
            onnx.utils.extract_model(whole, files[0], [INPUT], names, check_model=False)
            onnx.utils.extract_model(whole, files[1], names, [OUTPUT], check_model=False)
        except Exception as error:  # onnx's own, protobuf's, and plain ValueError, with no base in common
            raise MachineError(f"the graph cannot be split into encoders and projector ({error})") from error
        yield SplitGraph(open_on_cpu(files[0]), open_on_cpu(files[1]), names)
