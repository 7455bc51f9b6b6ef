"""Golden lines: held-out inputs with the float model's logits, stored in the bundle, and the drift measured on them.

With them a device can check itself: no torch, no original weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..bundle import GOLDEN, VISION, Bundle, Drift, read_tensors
from ..decode.decoder import Decoder
from ..errors import BundleError
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
    """Write lines as safetensors, numbered."""
    from safetensors.numpy import save_file

    tensors = {}
    for i, line in enumerate(lines):
        tensors[f"{i}.tokens"] = line.tokens.astype(np.int32)
        tensors[f"{i}.answer_from"] = np.array([line.answer_from], np.int32)
        tensors[f"{i}.logits"] = line.logits.astype(np.float32)
        if line.picture is not None and line.embeddings is not None:
            tensors[f"{i}.picture"] = line.picture
            tensors[f"{i}.embeddings"] = line.embeddings.astype(np.float32)
    save_file(tensors, file)


def read_golden(bundle: Bundle) -> list[GoldenLine]:
    """Read the bundle's golden lines, shapes checked against the model. Raises BundleError."""
    config = bundle.manifest.model
    tensors = read_tensors(bundle.path(GOLDEN))
    lines: list[GoldenLine] = []
    while f"{len(lines)}.tokens" in tensors:
        prefix = f"{len(lines)}."
        try:
            tokens, start = tensors[prefix + "tokens"], int(tensors[prefix + "answer_from"][0])
            line = GoldenLine(
                tokens,
                start,
                tensors[prefix + "logits"],
                tensors.get(prefix + "picture"),
                tensors.get(prefix + "embeddings"),
            )
        except (KeyError, IndexError) as error:
            raise BundleError(f"{GOLDEN}: line {len(lines)} is incomplete ({error}); export again") from error
        seen = line.embeddings is None or line.embeddings.shape == (config.n_visual_tokens, config.mamba.d_model)
        if line.picture is not None:
            seen = seen and line.picture.dtype == np.uint8 and line.picture.ndim == 3 and line.picture.shape[2] == 3
        fits = tokens.ndim == 1 and 1 <= start < len(tokens) and tokens.min() >= 0 and tokens.max() < config.mamba.vocab
        if not (fits and seen and line.logits.shape == (len(tokens) - start, config.mamba.vocab)):
            raise BundleError(f"{GOLDEN}: line {len(lines)} does not fit the model config; export again")
        lines.append(line)
    if not lines:
        raise BundleError(f"{GOLDEN}: holds no lines; export again")
    return lines


def measure_drift(bundle: Bundle, decoder: Decoder, on_line: Callable[[], None] = lambda: None) -> Drift:
    """Run the golden lines through the bundle's own vision graph and the decoder, and compare with the float logits.

    Args:
        bundle: an opened bundle.
        decoder: the runtime to measure.
        on_line: called after each line, for progress.
    """
    lines = read_golden(bundle)
    seen = _look_at_all(bundle, lines)
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
    )


def _look_at_all(bundle: Bundle, lines: list[GoldenLine]) -> list[np.ndarray | None]:
    """Return the bundle's own embeddings of each line; the vision graph is closed again before the decoder works."""
    if bundle.manifest.model.vision is None:
        return [None] * len(lines)
    from ..vision.session import VisionSession

    vision, transform = VisionSession(bundle.path(VISION), bundle.manifest.model), bundle.image()
    pictures = [line.picture for line in lines]
    return [None if p is None else vision.embed(transform.pixels(Image.fromarray(p))) for p in pictures]


def _vision_distance(lines: list[GoldenLine], seen: list[np.ndarray | None]) -> float | None:
    pairs = [
        (got, line.embeddings) for line, got in zip(lines, seen, strict=True) if got is not None and line.embeddings is not None
    ]
    if not pairs:
        return None
    got, expected = (np.stack(side).astype(np.float64) for side in zip(*pairs, strict=True))
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
