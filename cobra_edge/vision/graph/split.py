"""A vision graph cut between its encoders and its projector, so that each can be tried alone."""

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
    """Both halves, run by onnxruntime on the CPU; 16-bit graphs as a device computes them."""

    encoders: Any
    projector: Any
    names: Sequence[str]

    def features(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Return each encoder's features (1, n_patches, embed_dim) float32 of what `ImageTransform.pixels` gives."""
        return list(self.encoders.run(list(self.names), {INPUT: pixels}))

    def projected(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Return embeddings (n_visual_tokens, d_model) float32 of features."""
        embeddings: np.ndarray = self.projector.run([OUTPUT], dict(zip(self.names, features, strict=True)))[0]
        return embeddings[0]


@contextmanager
def open_split(bundle: Bundle) -> Iterator[SplitGraph]:
    """Cut a bundle's graph and open both halves.

    Raises:
        MachineError: the graph has no such place, or is too large to be cut.
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
            raise MachineError(f"the graph cannot be cut between encoders and projector ({error})") from error
        yield SplitGraph(open_on_cpu(files[0]), open_on_cpu(files[1]), names)
