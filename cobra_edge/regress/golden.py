"""Golden lines: held-out inputs with the float model's logits, stored in the bundle, and the drift measured on them.

With them a device can check itself: no torch, no original weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..bundle import GOLDEN, Bundle
from ..decode.decoder import Decoder
from ..errors import BundleError
from ..manifest import Drift
from ..model.config import CobraConfig
from ..recipe import StoredTensor
from ..tensor_file import TensorFileWriter, read_tensors
from ..vision.runtimes import VisionRunner, open_vision
from .metrics import kl_divergence, negative_log_likelihood, top1_agreement


@dataclass(frozen=True, eq=False)
class GoldenLine:
    """One line.

    Attributes:
        tokens: (n_text,) int32, prompt and answer with its end token.
        answer_from: index in tokens of the answer's first token.
        logits: (n_text - answer_from, vocab) float32, the float model's for each answer token, before it is read.
        picture: (height, width, 3) uint8, or None.
        embeddings: (n_visual_tokens, d_model) float32, the float model's, or None.
    """

    tokens: np.ndarray
    answer_from: int
    logits: np.ndarray
    picture: np.ndarray | None
    embeddings: np.ndarray | None


def write_golden(file: Path, lines: list[GoldenLine]) -> None:
    """Write lines as safetensors, numbered. Raises OSError as the file system does."""
    arrays: dict[str, np.ndarray] = {}
    for i, line in enumerate(lines):
        arrays[f"{i}.tokens"] = line.tokens.astype(np.int32)
        arrays[f"{i}.answer_from"] = np.array([line.answer_from], np.int32)
        arrays[f"{i}.logits"] = line.logits.astype(np.float32)
        if line.picture is not None and line.embeddings is not None:
            arrays[f"{i}.picture"] = line.picture
            arrays[f"{i}.embeddings"] = line.embeddings.astype(np.float32)
    announced = [StoredTensor(name, a.dtype.name, a.shape) for name, a in arrays.items()]
    with TensorFileWriter(file, announced) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def read_golden(bundle: Bundle) -> list[GoldenLine]:
    """Read the bundle's golden lines, dtypes and shapes checked against the model. Raises BundleError."""
    tensors = read_tensors(bundle.path(GOLDEN))
    lines: list[GoldenLine] = []
    while f"{len(lines)}.tokens" in tensors:
        fields = {name: tensors.pop(f"{len(lines)}.{name}", None) for name in _FIELDS}
        line = _checked_line(fields, bundle.manifest.model)
        if line is None:
            raise BundleError(f"{GOLDEN}: line {len(lines)} is incomplete or does not fit the model config; export again")
        lines.append(line)
    if not lines or tensors:
        raise BundleError(f"{GOLDEN}: {len(lines)} lines and stray tensors {sorted(tensors)[:4]}; export again")
    return lines


_FIELDS = {"tokens": np.int32, "answer_from": np.int32, "logits": np.float32, "picture": np.uint8, "embeddings": np.float32}


def _checked_line(fields: dict[str, np.ndarray | None], config: CobraConfig) -> GoldenLine | None:
    """Return the line, or None where a field is missing or not what the model asks for."""
    if any(value is not None and value.dtype != _FIELDS[name] for name, value in fields.items()):
        return None
    tokens, start, logits, picture, embeddings = fields.values()
    if tokens is None or start is None or logits is None or start.shape != (1,) or tokens.ndim != 1:
        return None
    answer_from, vocab = int(start[0]), config.mamba.vocab
    fits = 1 <= answer_from < len(tokens) and tokens.min() >= 0 and tokens.max() < vocab
    fits = fits and logits.shape == (len(tokens) - answer_from, vocab) and bool(np.isfinite(logits).all())
    fits = fits and (picture is None) == (embeddings is None) and (picture is None or config.vision is not None)
    if picture is not None and embeddings is not None:
        fits = fits and picture.ndim == 3 and picture.shape[2] == 3
        fits = fits and embeddings.shape == (config.n_visual_tokens, config.mamba.d_model)
    return GoldenLine(tokens, answer_from, logits, picture, embeddings) if fits else None


def measure_drift(
    bundle: Bundle,
    decoder: Decoder,
    on_line: Callable[[], None] = lambda: None,
    look: Callable[[Bundle], VisionRunner] = open_vision,
) -> Drift:
    """Run the golden lines through the bundle's own vision graph and the decoder, and compare with the float logits.

    Args:
        bundle: an opened bundle.
        decoder: the runtime to measure.
        on_line: called after each line, for progress.
        look: opens the vision runtime to measure.
    """
    lines = read_golden(bundle)
    seen, seen_by = _look_at_all(bundle, lines, look)
    kld, agree, nll, nll_reference = [], [], [], []
    for line, embeddings in zip(lines, seen, strict=True):
        state = decoder.new_state()
        if embeddings is not None:
            decoder.prefill(embeddings, state)
        tokens = line.tokens.tolist()
        logits = decoder.forward(decoder.embed(tokens[:-1]), state)[line.answer_from - 1 :]
        kld.append(kl_divergence(line.logits, logits))
        agree.append(top1_agreement(line.logits, logits))
        answer = line.tokens[line.answer_from :]
        nll.append(negative_log_likelihood(logits, answer))
        nll_reference.append(negative_log_likelihood(line.logits, answer))
        on_line()
    all_kld = np.concatenate(kld)
    return Drift(
        runtime=decoder.name,
        lines=len(lines),
        positions=len(all_kld),
        kld_mean=float(all_kld.mean()),
        kld_p99=float(np.quantile(all_kld, 0.99)),
        kld_max=float(all_kld.max()),
        top1_agreement=float(np.concatenate(agree).mean()),
        perplexity_ratio=float(np.exp(np.concatenate(nll).mean() - np.concatenate(nll_reference).mean())),
        vision_relative_rms=_vision_distance(lines, seen),
        vision_runtime=seen_by,
    )


def _look_at_all(
    bundle: Bundle, lines: list[GoldenLine], look: Callable[[Bundle], VisionRunner]
) -> tuple[list[np.ndarray | None], str | None]:
    """Return the bundle's own embeddings of each line, and what made them; it is closed again before the decoder works."""
    if bundle.manifest.model.vision is None:
        return [None] * len(lines), None
    transform, pictures = bundle.image(), [line.picture for line in lines]
    with closing(look(bundle)) as vision:
        seen = [None if p is None else vision.embed(transform.pixels(Image.fromarray(p))) for p in pictures]
    return seen, vision.name


def _vision_distance(lines: list[GoldenLine], seen: list[np.ndarray | None]) -> float | None:
    pairs = [
        (got, line.embeddings) for line, got in zip(lines, seen, strict=True) if got is not None and line.embeddings is not None
    ]
    if not pairs:
        return None
    got, expected = (np.stack(side).astype(np.float64) for side in zip(*pairs, strict=True))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
