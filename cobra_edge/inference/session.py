"""Session: an opened bundle that encodes an image once and answers any number of questions about it.

The image comes first in the prompt, so the decoder's state after the visual tokens does not depend on a question. `look`
returns that state; `ask` copies it, prefills the question and streams the answer. A conversation continues from an answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
from PIL import Image

from ..bundle.memory_plan import memory_for
from ..bundle.reader import TOKENIZER, Bundle
from ..decode.backends import open_decoder
from ..decode.decoder import DEFAULT_OPTIONS, Decoder, DecoderOptions, DecoderState, GpuDecoder, gpu_decoder
from ..decode.sampling import GREEDY, Sampling
from ..errors import InputError
from ..inputs.image import load_image
from ..inputs.image_array import image_of_array, require_channel_order
from ..vision.runtimes import GpuVision, VisionRunner, gpu_vision, open_vision
from .choices import Choices, Normalization, choose, tokenized_choices
from .forms import Form, FormMask, FormTokenizer
from .generate import generate as generate_tokens
from .logprobs import TokenLogprobs, require_top, token_logprobs


@dataclass(frozen=True, eq=False)
class Pixels:
    """A decoded image: `values` is what the bundle's `ImageTransform.pixels` returned, of its shape and dtype."""

    values: np.ndarray


ImageLike = Path | str | bytes | Image.Image | Pixels


def _nothing() -> Generator[str, None, None]:
    yield from ()


@dataclass
class Answer:
    """A streamed answer: iterate for pieces of text; the metrics are complete when the iteration has ended.

    Attributes:
        text: text so far.
        tokens: ids generated so far, without the end token.
        prompt_tokens, visual_tokens: numbers of tokens before the answer.
        ttft_ms: from the call of `ask` (image encoding included, if any) to the first token; None for no token.
        tpot_ms: mean time of each further token, the caller's time between them included; None for fewer than two.
        finish: "end" at the end token, "length" at the limit, "stopped" where `stop` ended it.
        logprobs: of each token, where they were asked for.
        state: decoder state after the answer; None before the iteration has ended.
    """

    prompt_tokens: int
    visual_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    finish: str = "length"
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    state: DecoderState | None = None
    _unread: list[int] = field(default_factory=list)  # tokens of the answer that are not in the state
    _prompt_state: DecoderState | None = None
    _pieces: Generator[str, None, None] = field(default_factory=_nothing)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text as they are decoded."""
        return self._pieces

    @property
    def unread(self) -> list[int]:
        """Tokens of an ended answer that `state` does not include: the last one, at the limit."""
        return list(self._unread)

    def read(self) -> str:
        """Decode the answer to its end and return its text."""
        for _ in self:
            pass
        return self.text

    def stop(self) -> None:
        """End the answer between two pieces: nothing more is decoded, and the conversation can continue from it.

        No effect on an answer that has ended.
        """
        self._pieces.close()
        if self.state is None and not self.tokens:  # not begun: the state is that after the prompt
            self.finish, self.state = "stopped", self._prompt_state


class _Closed:
    """Replaces decoder and vision of a closed session."""

    def __getattr__(self, name: str) -> NoReturn:
        raise InputError("the session is closed; open the bundle again with cobra_edge.load")


class Session:
    """An opened bundle: vision graph, decoder, tokenizer.

    `with cobra_edge.load(...) as session:` closes it at the end; otherwise its memory is freed with the last reference.
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
        """Open all parts; `vision` is a runtime that is already open.

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
        self._form_tokenizer: FormTokenizer | None = None
        self._making_masks = threading.Lock()
        self._looking = threading.Lock()  # on a GPU there is one room for embeddings, and one image in it

    def close(self) -> None:
        """Release the decoder and the vision runtime; later use of the session raises InputError.

        Answers that have begun keep what they need. A vision runtime passed to the constructor stays open. Idempotent.
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
        """Close the session."""
        self.close()

    def visual_embeddings(self, image: ImageLike | np.ndarray, *, channel_order: str = "rgb") -> np.ndarray:
        """Encode an image: visual embeddings, (n_visual_tokens, d_model) float32.

        Args:
            image: as for `ask`: an image, or an array (height, width, 3) or (height, width) uint8.
            channel_order: as for `ask`.

        Raises:
            InputError: the model has no vision encoder, or the image is unreadable.
        """
        vision, pixels = self._prepare(_as_image(image, channel_order))
        return vision.embed(pixels)

    def look(self, image: ImageLike | np.ndarray, *, channel_order: str = "rgb") -> DecoderState:
        """Encode an image and prefill it; any number of questions can start from the state returned, and it can be saved.

        Where vision and decoder are both on a GPU, the embeddings stay there.

        Args:
            image: as for `ask`: an image, or an array (height, width, 3) or (height, width) uint8.
            channel_order: as for `ask`.

        Raises:
            InputError: the model has no vision encoder, or the image is unreadable.
            MachineError: not enough memory.
        """
        decoder, vision = gpu_decoder(self.decoder), gpu_vision(self.vision)
        if decoder is not None and vision is not None:
            return self._look_on_gpu(decoder, vision, _as_image(image, channel_order))
        embeddings = self.visual_embeddings(image, channel_order=channel_order)
        with memory_for(f"prefilling the image's {len(embeddings)} embeddings", self.bundle.manifest):
            state = self.decoder.new_state()
            self.decoder.prefill(embeddings, state)
        return state

    def _look_on_gpu(self, decoder: GpuDecoder, vision: GpuVision, image: ImageLike) -> DecoderState:
        """See `look`: all work on one CUDA stream, from the pixels to the state."""
        _, pixels = self._prepare(image)
        count = self.config.n_visual_tokens
        with self._looking, memory_for(f"prefilling the image's {count} embeddings", self.bundle.manifest):
            room, state = decoder.embedding_room(count), decoder.new_state()
            vision.embed_into(pixels, room.address, decoder.stream)
            decoder.prefill(room, state)
        return state

    def _prepare(self, image: ImageLike) -> tuple[VisionRunner, np.ndarray]:
        """Return the vision runtime and its input for the image."""
        if self.vision is None or self._transform is None:
            raise InputError(f"{self.config.model_id} is a text-only model; leave the image out")
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
        form: Form | None = None,
        top_logprobs: int | None = None,
        channel_order: str = "rgb",
    ) -> Answer:
        """Ask a question about an image, about a state or an answer, or with no image given (None).

        Args:
            image: an image (a file's path or its bytes, a pillow image, or an array (height, width, 3) or (height, width)
                uint8), a state from `look` (not modified), a finished answer (continues its conversation), or None.
            prompt: question.
            max_new_tokens: maximum length of the answer.
            sampling: sampling parameters; greedy by default.
            form: that the answer must have, of `inference.forms`; None for free text. An answer that `max_new_tokens` cuts
                ("length") may be a part of it.
            top_logprobs: return log-probabilities of each token and of so many most probable ones, 0 to 20; None for none.
            channel_order: of an array: "rgb", or "bgr" for OpenCV's frames.

        Returns:
            An answer to iterate over. The prompt is prefilled; tokens are decoded as the answer is iterated.

        Raises:
            InputError: an empty or too long prompt, an unreadable image, an unfinished answer, or a form that is too complex.
            MachineError: not enough memory, or llguidance is not installed.
        """
        if max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {max_new_tokens}, expected 1 or more")
        if top_logprobs is not None:
            require_top(top_logprobs)
        began, mask = time.perf_counter(), None if form is None else self.form_mask(form)
        start, tokens, visual_tokens = self._start(image, prompt, channel_order)
        room = self._room_after(start, tokens)
        state = self._own_state(start)
        logits = self.prefill(tokens, state)
        limit = min(max_new_tokens, room - len(tokens))
        return self.generate(
            logits, state, limit, sampling, len(tokens), visual_tokens, began, mask=mask, top_logprobs=top_logprobs
        )

    def form_mask(self, form: Form) -> FormMask:
        """Return the masks of one answer of this form, for `generate`.

        Raises:
            InputError: the form is too complex. MachineError: llguidance is not installed.
        """
        with self._making_masks:
            if self._form_tokenizer is None:
                file = self.bundle.path(TOKENIZER)
                self._form_tokenizer = FormTokenizer(file, self.config.mamba.vocab, self.codec.end_id)
        return self._form_tokenizer.mask(form)

    def choose(
        self,
        image: ImageLike | np.ndarray | DecoderState | Answer | None,
        prompt: str,
        choices: Sequence[str],
        *,
        normalization: Normalization = "none",
        channel_order: str = "rgb",
    ) -> Choices:
        """Ask a closed question: return the probability of each of the given answers, without generating one.

        Args:
            image: as for `ask`.
            prompt: question; it need not name the choices.
            choices: 2 to 256 different answers.
            normalization: "none" compares the probabilities of whole answers, "length" their mean logarithm per token.
            channel_order: as for `ask`.

        Raises:
            InputError: as of `ask`; or choices that are too few, too many, empty or the same.
            MachineError: not enough memory.
        """
        sequences = tokenized_choices(choices, self.codec)
        start, tokens, _ = self._start(image, prompt, channel_order)
        room, longest = self._room_after(start, tokens) - len(tokens), max(map(len, sequences))
        if longest > room + 1:
            raise InputError(f"a choice is {longest} tokens, the model takes {room + 1} after this prompt; shorten one of them")
        state = self._own_state(start)
        return choose(self.decoder, self.prefill(tokens, state), state, choices, sequences, normalization)

    def _start(
        self, image: ImageLike | np.ndarray | DecoderState | Answer | None, prompt: str, channel_order: str
    ) -> tuple[ImageLike | DecoderState, list[int], int]:
        """Return what the prompt follows, its tokens, and the number of visual tokens before it."""
        if isinstance(image, Answer):
            return self._continue(image, prompt)
        if image is not None and not isinstance(image, DecoderState):
            image = _as_image(image, channel_order)
        tokens = self.codec.encode(self.template.first_turn(prompt))
        return self.decoder.new_state() if image is None else image, tokens, 0 if image is None else self.config.n_visual_tokens

    def _room_after(self, start: ImageLike | DecoderState, tokens: list[int]) -> int:
        """Return the number of tokens that fit after a state or an image. Raises InputError where the prompt does not."""
        before = self.config.n_visual_tokens
        if isinstance(start, DecoderState):
            start.require(self.config.mamba)
            before = start.n_tokens
        room = self.config.max_length - before
        if len(tokens) >= room:
            raise InputError(
                f"the prompt is {len(tokens)} tokens, the model takes {room - 1} after {before} already read; shorten it"
            )
        return room

    def _own_state(self, start: ImageLike | DecoderState) -> DecoderState:
        """Return a new state: that of an image, or a copy of the caller's, which may belong to another decoder."""
        return self.decoder.new_state(like=start) if isinstance(start, DecoderState) else self.look(start)

    def prefill(self, tokens: list[int], state: DecoderState) -> np.ndarray:
        """Prefill tokens into a state of this decoder, in place; returns the logits after the last one, (vocab,) float32.

        Raises:
            MachineError: not enough memory.
        """
        with memory_for(f"prefilling a prompt of {len(tokens)} tokens", self.bundle.manifest):
            return self.decoder.prefill(self.decoder.embed(tokens), state)

    def generate(
        self,
        logits: np.ndarray,
        state: DecoderState,
        max_new_tokens: int,
        sampling: Sampling,
        prompt_tokens: int = 0,
        visual_tokens: int = 0,
        began: float | None = None,
        *,
        mask: FormMask | None = None,
        top_logprobs: int | None = None,
    ) -> Answer:
        """Return the answer after a prefilled prompt; several answers may be iterated alternately, each with its own state.

        Args:
            logits: (vocab,) float32, after the prompt.
            state: after the prompt; changed in place.
            max_new_tokens: maximum length of the answer, at least 1.
            sampling: sampling parameters.
            prompt_tokens, visual_tokens: copied to the answer.
            began: `time.perf_counter()` at the start of the request; None for now.
            mask: of the answer's form, by `form_mask`.
            top_logprobs: as for `ask`.
        """
        answer = Answer(prompt_tokens=prompt_tokens, visual_tokens=visual_tokens, _prompt_state=state)

        def note(logits: np.ndarray, token: int) -> None:
            answer.logprobs.append(token_logprobs(logits, token, top_logprobs or 0))

        on_token = None if top_logprobs is None else note
        end = self.codec.end_id
        chosen = generate_tokens(self.decoder, logits, state, end, max_new_tokens, sampling, mask, on_token)
        answer._pieces = self._stream(answer, chosen, state, max_new_tokens, time.perf_counter() if began is None else began)
        return answer

    def _continue(self, answer: Answer, prompt: str) -> tuple[DecoderState, list[int], int]:
        """Return the state after an answer, the tokens up to the next answer, and the number of visual tokens."""
        if answer.state is None:
            raise InputError("the answer has not ended; iterate over it before the next question")
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
            self._finish(answer, state, read_before)
            raise
        self._finish(answer, state, read_before)

    def _finish(self, answer: Answer, state: DecoderState, read_before: int) -> None:
        """Set text and state of an ended answer."""
        # The stream holds back the bytes of an incomplete character; decoding all tokens yields replacement characters.
        answer.text = self.codec.decode(answer.tokens)
        answer.state, answer._unread = state, answer.tokens[state.n_tokens - read_before :]


def _as_image(image: ImageLike | np.ndarray, channel_order: str) -> ImageLike:
    """Convert an array (height, width, 3) or (height, width) uint8 to a pillow image; return other images unchanged.

    Raises:
        InputError: an invalid array, or a channel order for an image that is not an array.
    """
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
    """Open a bundle and return a session.

    Args:
        bundle: directory of the bundle, or an opened one.
        device: "auto", "cpu" or "cuda".
        kernels: decoder backend, "auto" for the first that runs the bundle.
        options: of the decoder: threads, precision of activations.
        vision_runtime: "auto" or a name from `vision.runtimes`.

    Raises:
        BundleError: the bundle is incomplete or damaged.
        MachineError: no backend can run it on this machine.
    """
    return Session(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), device, kernels, options, vision_runtime)
