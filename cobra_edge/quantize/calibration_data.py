"""Calibration data as a checkpoint reads it: lines as tokens, images as visual embeddings of the float model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..inputs.image import ImageTransform, load_image
from ..inputs.text import PromptTemplate, TextCodec
from ..model.checkpoint import Checkpoint
from ..model.cobra import load_vision
from ..suite.line import Line
from ..suite.tokenized import TokenizedSuite, tokenized_suite

_POSITIONS_AT_ONCE = 2048

OnProgress = Callable[[str, int, int], None]  # name of the step, units done, units in total


def no_progress(_step: str, _done: int, _total: int) -> None:
    """Report nothing: the default `OnProgress`."""


def calibration_suite(checkpoint: Checkpoint, lines: Sequence[Line], images: Path, *, answered: bool = True) -> TokenizedSuite:
    """Tokenize lines for a checkpoint, images indexed in the order of their names; a checkpoint without vision ignores images.

    Args:
        checkpoint: whose tokenizer and template.
        lines: numbered from 1 in messages.
        images: directory that image paths are relative to.
        answered: whether every line needs an answer.

    Raises:
        InputError: a prompt or an answer has no tokens; the message names the line number.
    """
    codec = TextCodec.open(checkpoint.tokenizer_file(), checkpoint.config.mamba.vocab)
    template, sees = PromptTemplate(checkpoint.config.prompt_style), checkpoint.config.vision is not None
    numbered = list(enumerate(lines, 1))
    suite = tokenized_suite(
        "calibration data", numbered, images.joinpath, codec, template, sees=sees, skipped={}, answered=answered
    )
    names = sorted(suite.images)
    index = {old: names.index(name) for old, name in enumerate(suite.images)}
    reindexed = [line if line.image is None else replace(line, image=index[line.image]) for line in suite.lines]
    return replace(suite, lines=reindexed, images=names, load=lambda image: images / names[image])


def data_sha256(suite: TokenizedSuite) -> str:
    """Return a hash over the lines of a calibration suite and the bytes of their images."""
    texts = [(line.line.image, line.line.prompt, line.line.answer) for line in suite.lines]
    digest = hashlib.sha256(msgspec.json.encode(texts))
    for index in range(len(suite.images)):
        image = suite.load(index)
        digest.update(image if isinstance(image, bytes) else image.read_bytes())
    return digest.hexdigest()


@torch.inference_mode()
def visual_embeddings(
    checkpoint: Checkpoint,
    images: Sequence[Path | bytes],
    on_progress: OnProgress = no_progress,
    model: nn.Module | None = None,
) -> Tensor:
    """Return the visual embeddings of images by the float model, (images · n_visual_tokens, d_model) float32.

    Args:
        checkpoint: whose vision tower and projector.
        images: files or their bytes.
        on_progress: called before each batch and at the end.
        model: result of `load_vision`, to reuse or replace it; None loads it.

    Raises:
        InputError: an image cannot be read, or embeddings are not finite.
    """
    model, transform = model or load_vision(checkpoint), ImageTransform.of(checkpoint.config)
    found, most = list[Tensor](), max(1, _POSITIONS_AT_ONCE // checkpoint.config.n_visual_tokens)
    for start in range(0, len(images), most):
        on_progress("images", start, len(images))
        files = images[start : start + most]
        batch = model(torch.from_numpy(np.concatenate([transform.pixels(load_image(f)) for f in files])))
        for file, embeddings in zip(files, batch, strict=True):
            require_finite_embeddings(file, embeddings)
            found.append(embeddings)
    on_progress("images", len(images), len(images))
    return torch.cat(found)


def require_finite_embeddings(image: Path | bytes, embeddings: Tensor) -> None:
    """Raise InputError unless visual embeddings (n_visual_tokens, d_model) float32 of an image are finite."""
    if not torch.isfinite(embeddings).all():
        name = image if isinstance(image, Path) else "an image of the suite"
        raise InputError(f"{name}: its visual embeddings hold NaN or infinity; the vision weights are damaged or overflow")


class EmbeddingCache:
    """Visual embeddings of image files by the float model, each computed once however many steps of an export need it.

    Holds n_visual_tokens · d_model · 4 bytes for each image.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Begin empty; the vision model is loaded when an image is not in the cache."""
        self._checkpoint, self._known = checkpoint, dict[Path, Tensor]()

    def add(self, image: Path, embeddings: np.ndarray) -> None:
        """Add embeddings (n_visual_tokens, d_model) float32 that were computed elsewhere."""
        self._known[image.resolve()] = torch.from_numpy(embeddings)

    def get(self, images: Sequence[Path], on_progress: OnProgress = no_progress) -> Tensor:
        """Return embeddings (images · n_visual_tokens, d_model) float32; as `visual_embeddings` where they are unknown."""
        files = [image.resolve() for image in images]
        missing = [(file, image) for file, image in dict(zip(files, images, strict=True)).items() if file not in self._known]
        if missing:
            new = visual_embeddings(self._checkpoint, [image for _, image in missing], on_progress)
            self._known |= zip((file for file, _ in missing), new.chunk(len(missing)), strict=True)
        for file, image in zip(files, images, strict=True):
            require_finite_embeddings(image, self._known[file])
        return torch.cat([self._known[file] for file in files])
