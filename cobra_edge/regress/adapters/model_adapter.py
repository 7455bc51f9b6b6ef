"""A bundle that sits an examination: likelihoods of given answers, and answers of its own.

A question is worded by the bundle's template, as `Session.ask` words it, unless raw prompts are asked for. The image comes
first, whatever place a task gives it. Images that come again are looked at once, and a context that is followed by several
continuations is read once.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...decode.decoder import DecoderOptions, DecoderState
from ...errors import InputError
from ...inference.generate import generate
from ...inference.session import Session, load
from ...inputs.image import load_image
from ...inputs.text import IMAGE_MARK
from ..metrics import log_softmax
from .generation_args import GenerationArgs

log = logging.getLogger(__name__)

_KEPT_IMAGES = 8  # states after an image; 26 MB each at Cobra-3B's size
_READ_AT_ONCE = 128  # positions whose logits lie in memory together


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
        log_p: of all its tokens together, nats.
        greedy: each of them is the likeliest one, so that greedy choice would write it.
        n_tokens: how many they are.
    """

    log_p: float
    greedy: bool
    n_tokens: int


class ModelAdapter:
    """A session that answers what a harness asks.

    Attributes:
        session: the opened bundle.
        raw_prompts: contexts are read as they are, not worded by the bundle's template.
        shortened: how many requests were longer than the model takes, and lost their beginning.
    """

    def __init__(self, session: Session, raw_prompts: bool = False) -> None:
        """Take a session."""
        self.session, self.raw_prompts, self.shortened = session, raw_prompts, 0
        self._looked = OrderedDict[bytes, DecoderState]()
        self._read: tuple[tuple[bytes | None, tuple[int, ...]], DecoderState, np.ndarray] | None = None

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        device: str,
        decoder_kernels: str,
        vision_runtime: str,
        threads: int | None,
        activations: str | None,
        raw_prompts: bool,
        batch_size: int | str,
    ) -> ModelAdapter:
        """Open a bundle for a harness, which hands a batch size to every model: a session reads one question at a time.

        Raises:
            BundleError, InputError, MachineError: as `cobra_edge.load` raises them; InputError for a batch of several.
        """
        if str(batch_size) not in ("1", "auto"):
            raise InputError(f"batch-size is {batch_size}, a session reads one question at a time; leave it at 1")
        options = DecoderOptions(threads, activations)
        return cls(
            load(bundle, device=device, kernels=decoder_kernels, options=options, vision_runtime=vision_runtime), raw_prompts
        )

    def loglikelihood(self, context: str, continuation: str, image: Image.Image | None = None) -> Likelihood:
        """Return how likely a continuation is.

        Args:
            context: the question; where it is empty, the end token stands in its place, without any wording.
            continuation: the answer, no end token after it. Behind a template the blanks in front of it are left out.
            image: seen before the context, or None.

        Raises:
            InputError: an image for a text-only model, a continuation longer than the model takes, logits that are not finite.
        """
        before, tokens = self._split(context, continuation)
        if not tokens:
            return Likelihood(0.0, True, 0)
        keep = self.session.config.max_length + 1 - self._seen(image) - len(tokens)
        state, first = self._after(self._fitted(before, keep, "continuation"), image)
        return self._forced(first, tokens, state.copy())

    def rolling(self, windows: Sequence[tuple[list[int], list[int]]]) -> float:
        """Return the sum of log p (nats) of tokens, given as windows of (read before, predicted).

        The first predicted token of a window follows the whole of what was read before it.
        """
        total = 0.0
        for before, tokens in windows:
            state = self.session.decoder.new_state()
            first = self.session.decoder.prefill(self.session.decoder.embed(before), state)
            total += self._forced(first, tokens, state).log_p
        return total

    def write(self, context: str, writing: GenerationArgs, image: Image.Image | None = None) -> str:
        """Return an answer of the model's own, without the end token and whatever follows a stop.

        Raises:
            InputError: an empty context, or an image for a text-only model.
        """
        session, seen = self.session, self._seen(image)
        room = session.config.max_length - seen
        tokens = self._fitted(self._encoded(context), room - 1, "image")
        state, logits = self._after(tokens, image)
        limit = min(writing.max_new_tokens, room - len(tokens))
        generated, text = list[int](), ""
        for token in generate(session.decoder, logits, state.copy(), session.codec.end_id, limit, writing.sampling):
            generated.append(token)
            text = session.codec.decode(generated)
            if (cut := writing.cut(text)) is not None:
                return cut
        return text

    def _encoded(self, context: str) -> list[int]:
        """Return the tokens of a context; the image's place in it is always the first and needs no mark."""
        if not self.raw_prompts:
            return self.session.codec.encode(self.session.template.first_turn(context))
        return self._raw(self._bare(context))

    def _bare(self, context: str) -> str:
        bare = context.replace(IMAGE_MARK, "")
        if not bare:
            raise InputError("the prompt is empty; a task must ask something in doc_to_text")
        return bare

    def _raw(self, text: str) -> list[int]:
        """Return the tokens of a raw prompt. Its template is part of the text, so control tokens in it are meant.

        That is how lm-eval's own models read it. Whoever asks for raw prompts trusts the task with the whole prompt; contexts
        that the bundle's template words, continuations behind it and documents are data, in which nothing is a control token.
        """
        codec = self.session.codec
        return codec.encode(codec.with_marks(text))

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of context and continuation.

        Behind a template they are encoded apart, as they are when the model writes. Raw, the two are encoded as one text and
        blanks between them belong to the continuation, as in lm-eval's own models.
        """
        codec = self.session.codec
        if not context:
            return [codec.end_id], codec.encode(continuation)
        if not self.raw_prompts:
            return self._encoded(context), codec.encode(continuation.lstrip())
        worded = self._bare(context)
        before = self._raw(worded.rstrip())
        return before or [codec.end_id], self._raw(worded + continuation)[len(before) :]

    def _seen(self, image: Image.Image | None) -> int:
        return 0 if image is None else self.session.config.n_visual_tokens

    def _fitted(self, tokens: list[int], keep: int, beside: str) -> list[int]:
        """Return the last `keep` tokens. Raises InputError when that is none."""
        if keep < 1:
            limit = self.session.config.max_length
            raise InputError(
                f"the {beside} alone fills the {limit} tokens that the model takes; leave the line out of the task"
            )
        if len(tokens) > keep:
            if not self.shortened:
                log.warning("a prompt of %d tokens is longer than the %d that fit; it loses its beginning", len(tokens), keep)
            self.shortened += 1
        return tokens[-keep:]

    def _look(self, image: Image.Image) -> tuple[bytes, DecoderState]:
        """Return the key and the state of an image, remembered by its content."""
        loaded = load_image(image)
        key = hashlib.sha256(repr(loaded.size).encode() + loaded.tobytes()).digest()
        if key not in self._looked:
            self._looked[key] = self.session.look(loaded)
            if len(self._looked) > _KEPT_IMAGES:
                self._looked.popitem(last=False)
        self._looked.move_to_end(key)
        return key, self._looked[key]

    def _after(self, tokens: list[int], image: Image.Image | None) -> tuple[DecoderState, np.ndarray]:
        """Return the state and the logits (vocab,) after an image and tokens; both are remembered, so copy the state."""
        looked, start = (None, self.session.decoder.new_state()) if image is None else self._look(image)
        key = looked, tuple(tokens)
        if self._read is None or self._read[0] != key:
            state = start.copy()
            self._read = key, state, self.session.decoder.prefill(self.session.decoder.embed(tokens), state)
        return self._read[1], self._read[2]

    def _forced(self, first: np.ndarray, tokens: list[int], state: DecoderState) -> Likelihood:
        """Return how likely tokens are; `first` (vocab,) are the logits before the first. The state moves on."""
        decoder, logits = self.session.decoder, first[None]
        total, greedy = 0.0, True
        for at in range(0, len(tokens), _READ_AT_ONCE):
            targets = np.array(tokens[at : at + _READ_AT_ONCE])
            if at or len(targets) > 1:
                read = tokens[max(at - 1, 0) : at + len(targets) - 1]
                rest = decoder.forward(decoder.embed(read), state)
                logits = rest if at else np.concatenate([logits, rest])
            total += float(np.take_along_axis(log_softmax(logits), targets[:, None], -1).sum())
            greedy &= bool((logits.argmax(-1) == targets).all())
        if not np.isfinite(total):
            raise InputError("the decoder produced logits that are not finite; check the bundle with cobra_edge.inspect")
        return Likelihood(total, greedy, len(tokens))


def only_image(visuals: Any, where: str) -> Image.Image | None:
    """Return the one image of a request, None where it has none.

    Args:
        visuals: what the task gave: an image, or a list of images.
        where: which request, for messages.

    Raises:
        InputError: several images, or something that is none.
    """
    found = visuals if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"{where} has {len(found)} images, the model looks at one; take a task with one image a question")
    if not isinstance(found[0], Image.Image):
        kind = type(found[0]).__name__
        raise InputError(f"{where} has a {kind} where an image is expected; decode it in the task (datasets.Image does)")
    return found[0]
