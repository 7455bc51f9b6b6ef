"""Guidance: what the gradients of the model's own predictions tell about each matrix.

Collected in one streamed pass forward and backward (`gradients`), one layer in memory at a time. Kept are

* for each position and each group of a projection's outputs, the mean squared gradient there: its weight in the second moments
  of guided GPTQ (`sequential`), which must be summed again because inputs change as layers are quantized;
* the Fisher moments of the embedding's rows, as a table and as the head;
* the expected cost of each scheme for each matrix, in nats (`costs`): what bit allocation weighs.

Source: GuidedQuant (Kim et al., ICML 2025), with groups of output channels; docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from ..formats.model_config import MambaConfig
from ..formats.recipe import FLOAT16, StoredTensor, matrix_names
from .sensitivity import CANDIDATE_SCHEMES, candidates
from .statistics import LAYER_PROJECTIONS, projection_name

SCHEMA_VERSION = 1
GROUPS = 4  # of consecutive output channels that share a weight; more pay little
TABLE, HEAD = "embedding.moment", "head.moment"
HEAD_ROWS = "head.rows"  # how much the errors of each row of the head count, on average 1


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Model and data of the guidance.

    Attributes:
        schema_version: of the parts that are kept for resuming.
        cobra_edge: version that wrote them.
        model_id: of the model, for messages.
        model_sha256: of the checkpoint, as `Checkpoint.sha256` says.
        data_sha256: over the lines and the bytes of their images.
        rotations: of the recipe that it guides: gradients are taken in the basis of what is stored.
        lines, positions, answers: numbers of lines, of positions read, and of positions that predict a token of an answer.
        groups: of output channels.
        seed: of the random signs.
    """

    schema_version: int
    cobra_edge: str
    model_id: str
    model_sha256: str
    data_sha256: str
    rotations: tuple[str, ...]
    lines: int
    positions: int
    answers: int
    groups: int
    seed: int


@dataclass(frozen=True, eq=False)
class Guidance:
    """Guidance of one model on one calibration set.

    Attributes:
        header: model and data.
        config: sizes of the decoder.
        tensors: by name, as `layer_tensors`, `head_tensors` and `table_tensors` list them.
    """

    header: Header
    config: MambaConfig
    tensors: Mapping[str, np.ndarray]

    def weights(self, layer: int, projection: str) -> np.ndarray:
        """Return the mean squared gradient at each position and group of outputs, (positions, groups) float32."""
        return self.tensors[weights_name(layer, projection)]

    def costs(self) -> dict[str, dict[str, float]]:
        """Return the expected cost in nats, by matrix and each storage that fits it."""
        found = {}
        for name, fits in candidates(self.config).items():
            known = dict(zip(CANDIDATE_SCHEMES, self.tensors[costs_name(name)].tolist(), strict=True)) | {FLOAT16: 0.0}
            found[name] = {s: known[s] for s in fits if math.isfinite(known[s])}
        return found

    def row_moment(self, *, head: bool) -> np.ndarray:
        """Return the Fisher moment that the rows of the head, or of the embedding table, share: (d_model, d_model) float32.

        A tied embedding is both, and has the sum of both moments.
        """
        if self.config.tied:
            return self.tensors[TABLE] + self.tensors[HEAD]
        return self.tensors[HEAD if head else TABLE]


def weights_name(layer: int, projection: str) -> str:
    """Return the name of the weights of a projection's positions."""
    return f"{projection_name(layer, projection)}.weights"


def costs_name(matrix: str) -> str:
    """Return the name of the costs of a matrix."""
    return f"{matrix}.costs"


def layer_tensors(header: Header, layer: int) -> list[StoredTensor]:
    """Return what is stored for a layer, in file order: weights, and costs by `CANDIDATE_SCHEMES`, NaN where none fits."""
    shape, found = (header.positions, header.groups), list[StoredTensor]()
    for projection in LAYER_PROJECTIONS:
        matrix = f"{projection_name(layer, projection)}.weight"
        found.append(StoredTensor(weights_name(layer, projection), "float32", shape))
        found.append(StoredTensor(costs_name(matrix), "float32", (len(CANDIDATE_SCHEMES),)))
    return found


def head_tensors(config: MambaConfig) -> list[StoredTensor]:
    """Return what is stored for the head, in file order."""
    moment = StoredTensor(HEAD, "float32", (config.d_model, config.d_model))
    return [moment, StoredTensor(HEAD_ROWS, "float32", (config.vocab,)), *_row_costs(config, "lm_head.weight")]


def table_tensors(config: MambaConfig) -> list[StoredTensor]:
    """Return what is stored for the embedding, in file order."""
    moment = StoredTensor(TABLE, "float32", (config.d_model, config.d_model))
    return [moment, *_row_costs(config, "backbone.embedding.weight")]


def _row_costs(config: MambaConfig, name: str) -> list[StoredTensor]:
    if name not in matrix_names(config):
        return []
    return [StoredTensor(costs_name(name), "float32", (len(CANDIDATE_SCHEMES),))]
