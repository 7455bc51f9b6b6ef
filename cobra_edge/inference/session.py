"""A bundle that answers: look at an image once, ask as often as you like.

The image comes first, so the decoder's state after the visual tokens is a complete summary of it that no question has touched.
`look` returns that state; `ask` copies it, reads the question and streams the answer. An answer can be asked on.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
from PIL import Image

from ..bundle.memory_plan import memory_for
from ..bundle.reader import Bundle
from ..decode.backends import open_decoder
from ..decode.decoder import DEFAULT_OPTIONS, Decoder, DecoderOptions, DecoderState, GpuDecoder, gpu_decoder
from ..decode.sampling import GREEDY, Sampling
from ..errors import InputError
from ..inputs.image import load_image
from ..inputs.image_array import image_of_array, require_channel_order
from ..vision.runtimes import GpuVision, VisionRunner, gpu_vision, open_vision
from .generate import generate


@dataclass(frozen=True, eq=False)
class Pixels:
    """An image that was decoded elsewhere: `values` is what `ImageTransform.pixels` of this bundle returned for it."""

    values: np.ndarray


ImageLike = Path | str | bytes | Image.Image | Pixels


def _nothing() -> Generator[str, None, None]:
    yield from ()


@dataclass
class Answer:
    """An answer as it comes: iterate for pieces of text; the figures are complete when the iteration has ended.

    Attributes:
        text: what was said so far.
        tokens: ids generated so far, without the end token.
        prompt_tokens, visual_tokens: positions read before the answer.
        ttft_ms: from the question (and image, where it was looked at for this question) to the first token; None for none.
        tpot_ms: mean time of each further token, the reader's own between them included; None for fewer than two.
        finish: "end" at the model's end token, "length" at the limit, "stopped" where `stop` ended it.
        state: what the decoder remembers when the iteration has ended, this answer included; None before.
    """

    prompt_tokens: int
    visual_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    finish: str = "length"
    state: DecoderState | None = None
    _unread: list[int] = field(default_factory=list)  # of this answer, not yet in the state
    _prompt_state: DecoderState | None = None
    _pieces: Generator[str, None, None] = field(default_factory=_nothing)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text as they are decoded."""
        return self._pieces

    @property
    def unread(self) -> list[int]:
        """Tokens of an ended answer that `state` has not read yet: the last one, at the limit."""
        return list(self._unread)

    def read(self) -> str:
        """Read the answer to its end and return its text."""
        for _ in self:
            pass
        return self.text

    def stop(self) -> None:
        """End the answer where it is, between two pieces: nothing more is decoded, and it can be asked on.

        One that has ended stays as it is.
        """
        self._pieces.close()
        if self.state is None and not self.tokens:  # not begun: all that was read is the prompt
            self.finish, self.state = "stopped", self._prompt_state


class _Closed:
    """Stands where a closed session had its decoder and its vision."""

    def __getattr__(self, name: str) -> NoReturn:
        raise InputError("the session is closed; open the bundle again with cobra_edge.load")


class Session:
    """An opened bundle: vision graph, decoder, tokenizer.

    `with cobra_edge.load(...) as session:` closes it at the end; otherwise its memory goes with the last reference to it.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "auto",
        kernels: str = "auto",
        options: DecoderOptions = DEFAULT_OPTIONS,
        vision_runtime: str = "auto",
        vision: VisionRunner | None = None,
    ) -> None:
        """Open all parts; `vision` is a runtime that is open already.

        Raises:
            BundleError, InputError, MachineError: a part cannot be opened.
        """
        self.bundle, self.config = bundle, bundle.manifest.model
        self.codec, self.template = bundle.text()
        self.decoder = open_decoder(bundle, device, kernels, options)
        self.vision: VisionRunner | None = None
        self._transform = None
        if self.config.vision is not None:
            on_gpu = gpu_decoder(self.decoder)
            stream = None if on_gpu is None else on_gpu.stream
            self.vision = vision or open_vision(bundle, device, vision_runtime, options.threads, stream)
            self._transform = bundle.image()
        self._owns_vision = vision is None

    def close(self) -> None:
        """Give back the decoder and the vision runtime; what is asked of the session afterwards is refused with InputError.

        Answers that have begun keep what they need. A vision runtime that was handed in stays open. A second call does nothing.
        """
        if self.vision is not None and not isinstance(self.vision, _Closed):
            if self._owns_vision:
                self.vision.close()
            self.vision = cast(VisionRunner, _Closed())
        self.decoder = cast(Decoder, _Closed())

    def __enter__(self) -> Session:
        """Return the session itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close it."""
        self.close()

    def visual_embeddings(self, image: ImageLike | np.ndarray, *, channel_order: str = "rgb") -> np.ndarray:
        """Return the image as the decoder sees it, (n_visual_tokens, d_model) float32.

        Args:
            image: as for `ask`.
            channel_order: as for `ask`.

        Raises:
            InputError: the model has no eyes, or the image is unreadable.
        """
        vision, pixels = self._prepared(_as_image(image, channel_order))
        return vision.embed(pixels)

    def look(self, image: ImageLike | np.ndarray, *, channel_order: str = "rgb") -> DecoderState:
        """Read an image; the state returned can start any number of questions, and be saved. Raises as above.

        Where vision and decoder are both on a GPU, the embeddings stay there.
        """
        decoder, vision = gpu_decoder(self.decoder), gpu_vision(self.vision)
        if decoder is not None and vision is not None:
            return self._look_on_gpu(decoder, vision, _as_image(image, channel_order))
        seen = self.visual_embeddings(image, channel_order=channel_order)
        with memory_for(f"reading the image's {len(seen)} embeddings", self.bundle.manifest):
            state = self.decoder.new_state()
            self.decoder.prefill(seen, state)
        return state

    def _look_on_gpu(self, decoder: GpuDecoder, vision: GpuVision, image: ImageLike) -> DecoderState:
        """See `look`: one stream of work, from the pixels to the logits."""
        _, pixels = self._prepared(image)
        count = self.config.n_visual_tokens
        with memory_for(f"reading the image's {count} embeddings", self.bundle.manifest):
            room, state = decoder.embedding_room(count), decoder.new_state()
            vision.embed_into(pixels, room.address, decoder.stream)
            decoder.prefill(room, state)
        return state

    def _prepared(self, image: ImageLike) -> tuple[VisionRunner, np.ndarray]:
        """Return what sees, and the image as it takes it."""
        if self.vision is None or self._transform is None:
            raise InputError(f"{self.config.model_id} is a text-only model; ask without an image")
        if isinstance(image, Pixels):
            return self.vision, image.values
        loaded = load_image(Path(image) if isinstance(image, str) else image)
        return self.vision, self._transform.pixels(loaded)

    def ask(
        self,
        image: ImageLike | np.ndarray | DecoderState | Answer | None,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        channel_order: str = "rgb",
    ) -> Answer:
        """Ask a question about an image, a remembered image, or (None) about nothing seen.

        Args:
            image: an image (a file's path or its bytes, a pillow image, or an array (height, width, 3) or (height, width)
                uint8), a state from `look` (left as it is), an answer that was read to its end (the conversation goes on from
                there), or None.
            prompt: the question.
            max_new_tokens: the answer's limit.
            sampling: greedy unless told otherwise.
            channel_order: of an array: "rgb", or "bgr" for OpenCV's frames.

        Returns:
            An answer to iterate over. Nothing is decoded before that, but the prompt has been read.

        Raises:
            InputError: an empty prompt, one longer than the model's limit, an unreadable image, an answer not yet read.
            MachineError: no memory to read it.
        """
        if max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {max_new_tokens}, expected 1 or more")
        began = time.perf_counter()
        start: ImageLike | DecoderState
        if not isinstance(image, DecoderState | Answer | None):
            image = _as_image(image, channel_order)
        if isinstance(image, Answer):
            start, tokens, seen = self._go_on(image, prompt)
        else:
            tokens = self.codec.encode(self.template.first_turn(prompt))
            start, seen = (self.decoder.new_state(), 0) if image is None else (image, self.config.n_visual_tokens)
        before = seen
        if isinstance(start, DecoderState):
            start.require(self.config.mamba)
            before = start.n_tokens
        room = self.config.max_length - before
        if len(tokens) >= room:
            raise InputError(
                f"the prompt is {len(tokens)} tokens, the model takes {room - 1} after {before} already read; shorten it"
            )
        state = start if isinstance(start, DecoderState) else self.look(start)
        if state is start:  # the caller's own, perhaps of another decoder
            state = self.decoder.new_state(like=state)
        logits = self.read(tokens, state)
        return self.speak(logits, state, min(max_new_tokens, room - len(tokens)), sampling, len(tokens), seen, began)

    def read(self, tokens: list[int], state: DecoderState) -> np.ndarray:
        """Read tokens into a state of this decoder, in place; returns the logits after the last one, (vocab,) float32.

        Raises:
            MachineError: no memory for it.
        """
        with memory_for(f"reading a prompt of {len(tokens)} tokens", self.bundle.manifest):
            return self.decoder.prefill(self.decoder.embed(tokens), state)

    def speak(
        self,
        logits: np.ndarray,
        state: DecoderState,
        max_new_tokens: int,
        sampling: Sampling,
        prompt_tokens: int = 0,
        visual_tokens: int = 0,
        began: float | None = None,
    ) -> Answer:
        """Return the answer to what has been read; several may be iterated over in turns, each with a state of its own.

        Args:
            logits: (vocab,) float32, after the prompt.
            state: after the prompt; changed in place.
            max_new_tokens: the answer's limit, at least 1.
            sampling: how tokens are chosen.
            prompt_tokens, visual_tokens: for the answer's own record.
            began: `time.perf_counter()` of the question; None for now.
        """
        answer = Answer(prompt_tokens=prompt_tokens, visual_tokens=visual_tokens, _prompt_state=state)
        chosen = generate(self.decoder, logits, state, self.codec.end_id, max_new_tokens, sampling)
        answer._pieces = self._stream(answer, chosen, state, max_new_tokens, time.perf_counter() if began is None else began)
        return answer

    def _go_on(self, answer: Answer, prompt: str) -> tuple[DecoderState, list[int], int]:
        """Return the state after an answer, the tokens that end it and ask the next question, and its visual tokens."""
        if answer.state is None:
            raise InputError("the answer has not been read to its end; read it before you ask on")
        turn = self.codec.encode(self.template.later_turn(prompt))
        return answer.state, [*answer._unread, self.codec.end_id, *turn], answer.visual_tokens

    def _stream(
        self, answer: Answer, tokens: Iterator[int], state: DecoderState, limit: int, began: float
    ) -> Generator[str, None, None]:
        pieces, first, last, read_before = self.codec.stream(), began, began, state.n_tokens
        try:
            for token in tokens:
                last = time.perf_counter()
                if not answer.tokens:
                    first = last
                    answer.ttft_ms = (first - began) * 1e3
                answer.tokens.append(token)
                if len(answer.tokens) > 1:
                    answer.tpot_ms = (last - first) * 1e3 / (len(answer.tokens) - 1)
                piece = pieces.step(token)
                if piece:
                    answer.text += piece
                    yield piece
            answer.finish = "end" if len(answer.tokens) < limit else "length"
        except GeneratorExit:
            answer.finish = "stopped"
            self._settle(answer, state, read_before)
            raise
        self._settle(answer, state, read_before)

    def _settle(self, answer: Answer, state: DecoderState, read_before: int) -> None:
        """Note where an ended answer left off, for the next question."""
        # Bytes of an unfinished character never left the stream; the whole decoding has them as replacement marks.
        answer.text = self.codec.decode(answer.tokens)
        answer.state, answer._unread = state, answer.tokens[state.n_tokens - read_before :]


def _as_image(image: ImageLike | np.ndarray, channel_order: str) -> ImageLike:
    """Return an array as a pillow image, and others as they are. Raises InputError for an order where it means nothing."""
    require_channel_order(channel_order)
    if isinstance(image, np.ndarray):
        return image_of_array(image, channel_order)
    if channel_order != "rgb":
        raise InputError(f"channel_order={channel_order!r} is for arrays; leave it out for a {type(image).__name__}")
    return image


def load(
    bundle: Path | str | Bundle,
    *,
    device: str = "auto",
    kernels: str = "auto",
    options: DecoderOptions = DEFAULT_OPTIONS,
    vision_runtime: str = "auto",
) -> Session:
    """Open a bundle and return a session. Raises BundleError when it is not whole, MachineError when nothing runs it."""
    return Session(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), device, kernels, options, vision_runtime)
