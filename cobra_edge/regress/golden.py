"""Golden lines: a held-out suite in the bundle, with the float model's predictions.

With them a device compares its own build with the float model, without torch, the checkpoint or any other file. The format is
described in docs/bundle.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ..bundle.reader import GOLDEN, Bundle
from ..errors import BundleError, InputError
from ..formats.recipe import StoredTensor
from ..formats.safetensors_file import SafetensorsWriter, read_tensors
from ..suite.line import Line
from ..suite.reader import flaw_of
from ..suite.tokenized import TokenizedSuite, tokenized_suite
from .predictions import Prediction
from .state_sketch import SKETCH_SIZE
from .top_tokens import TopTokens

# {name: (dtype, number of axes)}; described in docs/bundle.md.
_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "lines": (np.uint8, 1),
    "pictures": (np.uint8, 1),
    "picture_offsets": (np.int64, 1),
    "embeddings": (np.float32, 3),
    "kept_offsets": (np.int64, 1),
    "kept_ids": (np.int32, 1),
    "kept_log_probs": (np.float32, 1),
    "tails": (np.float32, 1),
    "states": (np.float32, 3),
    "replies": (np.int32, 1),
    "reply_offsets": (np.int64, 1),
}


@dataclass(frozen=True, eq=False)
class Golden:
    """A suite, and the float model's prediction of each of its lines, with log-probabilities as TopTokens."""

    suite: TokenizedSuite
    predictions: Sequence[Prediction]


def write_golden(file: Path, suite: TokenizedSuite, predictions: Sequence[Prediction], embeddings: np.ndarray) -> None:
    """Write golden lines.

    Args:
        file: golden.safetensors.
        suite: with its images.
        predictions: of each line, with log-probabilities as TopTokens.
        embeddings: (images, n_visual_tokens, d_model) float32, visual embeddings of the float model.

    Raises:
        OSError: from the file system.
    """
    kept = [r.log_probs for r in predictions if isinstance(r.log_probs, TopTokens)]
    assert len(kept) == len(predictions) == len(suite.lines) and len(embeddings) == len(suite.images)
    images = [_content(suite.load(i)) for i in range(len(suite.images))]
    arrays = {
        "lines": np.frombuffer(b"\n".join(msgspec.json.encode(tokenized.line) for tokenized in suite.lines), np.uint8),
        "pictures": np.frombuffer(b"".join(images), np.uint8),
        "picture_offsets": _offsets([len(p) for p in images]),
        "embeddings": embeddings,
        "kept_offsets": _offsets(np.concatenate([np.diff(t.offsets) for t in kept])),
        "kept_ids": np.concatenate([t.ids for t in kept]),
        "kept_log_probs": np.concatenate([t.log_probs for t in kept]),
        "tails": np.concatenate([t.tails for t in kept]),
        "states": np.stack([r.state for r in predictions]),
        "replies": np.array([token for r in predictions for token in r.reply], np.int32),
        "reply_offsets": _offsets([len(r.reply) for r in predictions]),
    }
    announced = [StoredTensor(name, np.dtype(_ARRAYS[name][0]).name, a.shape) for name, a in arrays.items()]
    with SafetensorsWriter(file, announced) as writer:
        for name, array in arrays.items():
            writer.write(name, array.astype(_ARRAYS[name][0], copy=False))


def _content(image: Path | bytes) -> bytes:
    return image if isinstance(image, bytes) else image.read_bytes()


def _offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def read_golden(bundle: Bundle) -> Golden:
    """Read the golden lines of a bundle, validated against its model and tokenizer. Raises BundleError."""
    arrays = read_tensors(bundle.path(GOLDEN))
    kinds = {name: (a.dtype.type, a.ndim) for name, a in arrays.items()}
    if kinds != _ARRAYS:
        odd = sorted(name for name in kinds.keys() | _ARRAYS.keys() if kinds.get(name) != _ARRAYS.get(name))
        raise BundleError(
            f"{GOLDEN}: {', '.join(odd)[:200]}: missing, unexpected or of the wrong type; export the bundle again"
        )
    try:
        suite = _suite(bundle, arrays)
        return Golden(suite, _predictions(bundle, suite, arrays))
    except (ValueError, IndexError, InputError, msgspec.MsgspecError) as error:
        raise BundleError(f"{GOLDEN}: does not fit the model ({error}); export the bundle again") from error


def _suite(bundle: Bundle, arrays: dict[str, np.ndarray]) -> TokenizedSuite:
    lines = [msgspec.json.decode(text, type=Line) for text in arrays["lines"].tobytes().split(b"\n")]
    for number, line in enumerate(lines, 1):
        if flaw := flaw_of(line):
            raise ValueError(f"line {number}: {flaw}")
    images = _parts(arrays["pictures"], arrays["picture_offsets"])
    names = list(dict.fromkeys(line.image for line in lines if line.image is not None))
    codec, template = bundle.text()
    sees = bundle.manifest.model.vision is not None
    if len(images) != (len(names) if sees else 0):
        raise ValueError(f"{len(images)} images, but the lines refer to {len(names)}")
    content = {name: image.tobytes() for name, image in zip(names, images, strict=False)}
    numbered = list(enumerate(lines, 1))
    return tokenized_suite("the bundle's golden lines", numbered, content.__getitem__, codec, template, sees=sees, skipped={})


def _predictions(bundle: Bundle, suite: TokenizedSuite, arrays: dict[str, np.ndarray]) -> list[Prediction]:
    config, states, embeddings = bundle.manifest.model, arrays["states"], arrays["embeddings"]
    if states.shape != (len(suite.lines), config.mamba.n_layer, SKETCH_SIZE) or not np.isfinite(states).all():
        raise ValueError(f"states {states.shape}")
    shape = (len(suite.images), config.n_visual_tokens, config.mamba.d_model)
    if suite.images and (embeddings.shape != shape or not np.isfinite(embeddings).all()):
        raise ValueError(f"embeddings {embeddings.shape}, expected finite {shape}")
    replies = _parts(arrays["replies"], arrays["reply_offsets"])
    if len(replies) != len(suite.lines):
        raise ValueError(f"{len(replies)} replies to {len(suite.lines)} lines")
    _require_tokens("replies", arrays["replies"], config.mamba.vocab)
    positions = _offsets([len(tokenized.tokens) - 1 for tokenized in suite.lines])
    top = _top_tokens(arrays, np.concatenate([tokenized.tokens[1:] for tokenized in suite.lines]), config.mamba.vocab)
    return [
        Prediction(
            top.part(int(positions[i]), int(positions[i + 1])),
            states[i],
            tuple(replies[i].tolist()),
            None if tokenized.image is None else embeddings[tokenized.image],
        )
        for i, tokenized in enumerate(suite.lines)
    ]


def _top_tokens(arrays: dict[str, np.ndarray], targets: np.ndarray, vocab: int) -> TopTokens:
    """Return the distributions at all positions, with targets (positions,) int."""
    offsets, ids, log_probs, tails = (arrays[name] for name in ("kept_offsets", "kept_ids", "kept_log_probs", "tails"))
    # Compared, not subtracted: a difference can overflow.
    rising = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(ids) and (offsets[1:] > offsets[:-1]).all()
    if not rising or not (len(offsets) - 1 == len(tails) == len(targets)):
        raise ValueError(f"{len(offsets) - 1} distributions of {len(ids)} tokens for {len(targets)} positions")
    sizes = np.diff(offsets)
    _require_tokens("kept_ids", ids, vocab)
    if log_probs.shape != ids.shape or not (np.isfinite(log_probs).all() and log_probs.max() <= 0):
        raise ValueError("kept_log_probs are not logarithms of probabilities")
    if not ((tails >= 0) & (tails <= 1)).all():
        raise ValueError("tails are not probabilities")
    rows = np.repeat(np.arange(len(tails)), sizes)
    if (np.bincount(rows[ids == targets[rows]], minlength=len(tails)) != 1).any():
        raise ValueError("a target is not among the kept tokens")
    return TopTokens(offsets, ids, log_probs, tails)


def _require_tokens(what: str, ids: np.ndarray, vocab: int) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
        raise ValueError(f"{what} contains tokens outside the vocabulary")


def _parts(flat: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(flat) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("offsets do not match their array")
    return [flat[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
