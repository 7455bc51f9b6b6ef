"""Questions about images with their answers, as a decoder reads them: visual embeddings in front of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..inputs.image import ImageTransform, load_image
from ..inputs.text import PromptTemplate, TextCodec
from ..model.checkpoint import Checkpoint
from ..model.cobra import load_vision

_POSITIONS_AT_ONCE = 2048

OnProgress = Callable[[str, int, int], None]  # a stage, how much of it is done, how much there is


def silent(_stage: str, _done: int, _total: int) -> None:
    """Tell nobody: an OnProgress."""


class Question(Protocol):
    """A line of a suite, as `regress.suite.Line`: `image` is relative to the images' directory, None without an image."""

    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def answer(self) -> str: ...  # noqa: D102
    @property
    def image(self) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions as a model reads them.

    Attributes:
        images: names of the images, each once.
        tokens: of each line, question and answer with its end token.
        answer_from: of each line, the index in its tokens at which the answer begins.
        image_of: of each line, the index of its image, or None.
    """

    images: list[str]
    tokens: list[list[int]]
    answer_from: list[int]
    image_of: list[int | None]


def tokenised(checkpoint: Checkpoint, lines: Sequence[Question]) -> Questions:
    """Return lines as the checkpoint reads them; one without vision sees no images.

    Raises:
        InputError: a line that gives no tokens, or has no answer; its number is named.
    """
    codec = TextCodec.open(checkpoint.tokenizer_file(), checkpoint.config.mamba.vocab)
    template, sees = PromptTemplate(checkpoint.config.prompt_style), checkpoint.config.vision is not None
    names = sorted({line.image for line in lines if line.image is not None}) if sees else []
    index = {name: i for i, name in enumerate(names)}
    tokens, starts = list[list[int]](), list[int]()
    for number, line in enumerate(lines, 1):
        try:
            asked, answer = codec.encode(template.first_turn(line.prompt)), codec.encode(line.answer)
        except InputError as error:
            raise InputError(f"calibration data, question {number}: {error}") from error
        if not answer:
            raise InputError(
                f"calibration data, question {number} ({line.prompt[:60]!r}): no answer; expected what the model should say"
            )
        starts.append(len(asked))
        tokens.append([*asked, *answer, codec.end_id])
    return Questions(names, tokens, starts, [index.get(line.image or "") for line in lines])


@torch.inference_mode()
def seen(
    checkpoint: Checkpoint,
    images: Sequence[Path | bytes],
    on_progress: OnProgress = silent,
    model: nn.Module | None = None,
) -> Tensor:
    """Return the visual embeddings of images by the float model, (images · n_visual_tokens, d_model) float32.

    Args:
        checkpoint: whose tower and projector.
        images: files, or what is in them.
        on_progress: told of each batch.
        model: the checkpoint's `load_vision`, where it is kept for further calls or was changed; None loads it.

    Raises:
        InputError: an image that cannot be read, or embeddings that are not finite.
    """
    model, transform = model or load_vision(checkpoint), ImageTransform.of(checkpoint.config)
    found, most = list[Tensor](), max(1, _POSITIONS_AT_ONCE // checkpoint.config.n_visual_tokens)
    for start in range(0, len(images), most):
        on_progress("images", start, len(images))
        files = images[start : start + most]
        batch = model(torch.from_numpy(np.concatenate([transform.pixels(load_image(f)) for f in files])))
        for file, embeddings in zip(files, batch, strict=True):
            if not torch.isfinite(embeddings).all():
                name = file if isinstance(file, Path) else "an image of the suite"
                raise InputError(
                    f"{name}: its visual embeddings hold NaN or infinity; the vision weights are damaged or overflow"
                )
            found.append(embeddings)
    on_progress("images", len(images), len(images))
    return torch.cat(found)
