"""Adapter between benchmark harnesses and a session: likelihoods of given answers, and generated answers.

The template of the bundle is applied to a context, as in `Session.ask`, except for raw prompts. The image comes first, wherever
a task puts it. The states after recent images are cached, and so is the state after the last context, which several
continuations may share.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...decode.decoder import DecoderState
from ...errors import InputError
from ...inference.generate import generate
from ...inference.session import Session
from ...inference.session_options import Opening
from ...inputs.image import load_image
from ...inputs.text import IMAGE_MARK
from ..metrics import log_softmax
from .generation_args import GenerationArgs

log = logging.getLogger(__name__)

_CACHED_IMAGES = 8  # states after an image, 26 MB each at the size of Cobra-3B
_CHUNK = 128  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of a continuation.

    Attributes:
        log_p: natural logarithm of the probability of all its tokens.
        greedy: each token is the most probable one, so greedy decoding would generate the continuation.
        n_tokens: number of tokens.
    """

    log_p: float
    greedy: bool
    n_tokens: int


class ModelAdapter:
    """A session that answers the requests of a benchmark harness.

    Attributes:
        session: the opened bundle.
        raw_prompts: contexts are used as they are, without the bundle's template.
        shortened: number of requests that were longer than the model accepts and were truncated on the left.
    """

    def __init__(self, session: Session, raw_prompts: bool = False) -> None:
        """Wrap a session."""
        self.session, self.raw_prompts, self.shortened = session, raw_prompts, 0
        self._looked = OrderedDict[bytes, DecoderState]()
        self._read: tuple[tuple[bytes | None, tuple[int, ...]], DecoderState, np.ndarray] | None = None

    @classmethod
    def open(cls, opening: Opening, raw_prompts: bool, batch_size: int | str) -> ModelAdapter:
        """Open a bundle for a harness, which passes a batch size to every model.

        Raises:
            BundleError, InputError, MachineError: as `cobra_edge.load` raises them; InputError for a batch of several.
        """
        if str(batch_size) not in ("1", "auto"):
            raise InputError(f"batch-size is {batch_size}, but a session handles one request at a time; set it to 1")
        return cls(opening.load(), raw_prompts)

    def loglikelihood(self, context: str, continuation: str, image: Image.Image | None = None) -> Likelihood:
        """Return the likelihood of a continuation.

        Args:
            context: the question; an empty one is replaced by the end token, without the template.
            continuation: the answer, without an end token. After a template its leading whitespace is removed.
            image: that precedes the context, or None.

        Raises:
            InputError: an image for a text-only model, a continuation longer than the model accepts, non-finite logits.
        """
        before, tokens = self._split(context, continuation)
        if not tokens:
            return Likelihood(0.0, True, 0)
        keep = self.session.config.max_length + 1 - self._visual_tokens(image) - len(tokens)
        state, first = self._after(self._fitted(before, keep, "continuation"), image)
        return self._forced(first, tokens, state.copy())

    def rolling(self, windows: Sequence[tuple[list[int], list[int]]]) -> float:
        """Return the sum of log p in nats over the tokens of windows.

        Args:
            windows: pairs of context tokens and predicted tokens; the first predicted token follows the whole context.
        """
        total = 0.0
        for context, tokens in windows:
            state = self.session.decoder.new_state()
            first = self.session.decoder.prefill(self.session.decoder.embed(context), state)
            total += self._forced(first, tokens, state).log_p
        return total

    def generate(self, context: str, args: GenerationArgs, image: Image.Image | None = None) -> str:
        """Return a generated answer, without the end token, cut before the first stop string.

        Raises:
            InputError: an empty context, or an image for a text-only model.
        """
        session = self.session
        room = session.config.max_length - self._visual_tokens(image)
        tokens = self._fitted(self._encoded(context), room - 1, "image")
        state, logits = self._after(tokens, image)
        limit = min(args.max_new_tokens, room - len(tokens))
        generated, text = list[int](), ""
        for token in generate(session.decoder, logits, state.copy(), session.codec.end_id, limit, args.sampling):
            generated.append(token)
            text = session.codec.decode(generated)
            if (cut := args.cut(text)) is not None:
                return cut
        return text

    def _encoded(self, context: str) -> list[int]:
        """Return the tokens of a context without its image placeholder: the image always comes first."""
        if not self.raw_prompts:
            return self.session.codec.encode(self.session.template.first_turn(context))
        return self._raw(self._bare(context))

    def _bare(self, context: str) -> str:
        bare = context.replace(IMAGE_MARK, "")
        if not bare:
            raise InputError("the prompt is empty; return a text from doc_to_text of the task")
        return bare

    def _raw(self, text: str) -> list[int]:
        """Return the tokens of a raw prompt, in which control tokens are parsed, as in lm-eval's own models.

        Raw prompts trust the task with the whole prompt, template included. Contexts to which the bundle's template is applied,
        their continuations, and documents are data: there the text of a control token is only text.
        """
        codec = self.session.codec
        return codec.encode(codec.with_marks(text))

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of context and continuation.

        With a template, they are tokenized separately, as in generation. Raw, they are tokenized as one text, and whitespace
        between them belongs to the continuation, as in lm-eval's own models.
        """
        codec = self.session.codec
        if not context:
            return [codec.end_id], codec.encode(continuation)
        if not self.raw_prompts:
            return self._encoded(context), codec.encode(continuation.lstrip())
        whole = self._bare(context)
        before = self._raw(whole.rstrip())
        return before or [codec.end_id], self._raw(whole + continuation)[len(before) :]

    def _visual_tokens(self, image: Image.Image | None) -> int:
        return 0 if image is None else self.session.config.n_visual_tokens

    def _fitted(self, tokens: list[int], keep: int, beside: str) -> list[int]:
        """Return the last `keep` tokens. Raises InputError if that is none."""
        if keep < 1:
            limit = self.session.config.max_length
            raise InputError(
                f"the {beside} alone fills the {limit} tokens that the model accepts; remove the document from the task"
            )
        if len(tokens) > keep:
            if not self.shortened:
                log.warning(
                    "a prompt of %d tokens is longer than the %d that fit; it is truncated on the left", len(tokens), keep
                )
            self.shortened += 1
        return tokens[-keep:]

    def _look(self, image: Image.Image) -> tuple[bytes, DecoderState]:
        """Return the cache key of an image, a hash of its content, and the state after it."""
        loaded = load_image(image)
        key = hashlib.sha256(repr(loaded.size).encode() + loaded.tobytes()).digest()
        if key not in self._looked:
            self._looked[key] = self.session.look(loaded)
            if len(self._looked) > _CACHED_IMAGES:
                self._looked.popitem(last=False)
        self._looked.move_to_end(key)
        return key, self._looked[key]

    def _after(self, tokens: list[int], image: Image.Image | None) -> tuple[DecoderState, np.ndarray]:
        """Return the state and the logits (vocab,) float32 after an image and tokens; both are cached, so copy the state."""
        looked, start = (None, self.session.decoder.new_state()) if image is None else self._look(image)
        key = looked, tuple(tokens)
        if self._read is None or self._read[0] != key:
            state = start.copy()
            self._read = key, state, self.session.decoder.prefill(self.session.decoder.embed(tokens), state)
        return self._read[1], self._read[2]

    def _forced(self, first: np.ndarray, tokens: list[int], state: DecoderState) -> Likelihood:
        """Return the likelihood of tokens; `first` (vocab,) float32 are the logits before the first. Advances the state."""
        decoder, logits = self.session.decoder, first[None]
        total, greedy = 0.0, True
        for at in range(0, len(tokens), _CHUNK):
            targets = np.array(tokens[at : at + _CHUNK])
            if at or len(targets) > 1:
                read = tokens[max(at - 1, 0) : at + len(targets) - 1]
                rest = decoder.forward(decoder.embed(read), state)
                logits = rest if at else np.concatenate([logits, rest])
            total += float(np.take_along_axis(log_softmax(logits), targets[:, None], -1).sum())
            greedy &= bool((logits.argmax(-1) == targets).all())
        if not np.isfinite(total):
            raise InputError("the logits of the decoder are not finite; check the bundle with cobra_edge.inspect")
        return Likelihood(total, greedy, len(tokens))


def only_image(visuals: Any, where: str) -> Image.Image | None:
    """Return the image of a request; None if it has none.

    Args:
        visuals: an image, a list of images, or None, as the task returns them.
        where: name of the request, for messages.

    Raises:
        InputError: several images, or a value that is not an image.
    """
    found = visuals if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"{where} has {len(found)} images, the model accepts one; use a task with one image per question")
    if not isinstance(found[0], Image.Image):
        kind = type(found[0]).__name__
        raise InputError(f"{where} has a {kind} instead of an image; decode it in the task, for example with datasets.Image")
    return found[0]
