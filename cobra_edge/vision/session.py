"""Run the vision graph with onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..errors import BundleError
from ..model.config import CobraConfig

INPUT, OUTPUT = "pixels", "embeddings"


class VisionSession:
    """An opened vision graph."""

    def __init__(self, file: Path, config: CobraConfig, threads: int | None = None) -> None:
        """Open the graph on the CPU.

        Args:
            file: the graph.
            config: of the model it belongs to.
            threads: how many; None for one a physical core.

        Raises:
            BundleError: unreadable, or its input and output are not those of the config.
        """
        assert config.vision is not None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        # Its threads would go on spinning on the cores that the decoder needs next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exception types share no base but Exception
            raise BundleError(f"{file}: onnxruntime cannot open it ({error})") from error
        size = config.vision.image_size
        wanted_in = [1, 3 * len(config.vision.encoders), size, size]
        wanted_out = [1, config.n_visual_tokens, config.mamba.d_model]
        got = [(i.name, i.shape) for i in (*self._session.get_inputs(), *self._session.get_outputs())]
        if got != [(INPUT, wanted_in), (OUTPUT, wanted_out)]:
            raise BundleError(f"{file}: inputs and outputs are {got}, expected {INPUT} {wanted_in} and {OUTPUT} {wanted_out}")

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Turn pixels (1, 3·n_encoders, size, size) float32 into visual embeddings (n_visual_tokens, d_model) float32."""
        embeddings: Any = self._session.run([OUTPUT], {INPUT: pixels})[0]
        return embeddings[0]
