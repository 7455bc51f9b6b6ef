"""The decoder on an NVIDIA GPU: CUDA kernels over the bundle's own codes, through the driver alone.

One token is a CUDA graph of a few launches a layer, between buffers that never move; activations enter products as 16-bit
integers there, and the state is found through an address, so that one graph steps any state. Many tokens go through tensor
cores in float16 and a scan in float32. Everything runs on a stream of the decoder's own; a method has done its work when it
returns. Threads may share a decoder: its buffers are one call's at a time.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from ...bundle.reader import DECODER, Bundle
from ...errors import MachineError
from ..arguments import checked_embeddings, checked_tokens, require_positions
from ..decoder import DEFAULT_OPTIONS, DecoderOptions, DecoderState, Weights
from ..sampling import Sampling
from .calls import CudaError
from .device import first_gpu
from .device_memory import DeviceMemory
from .launch import Address, Queue
from .memory import DeviceBlock, copy_across, copy_in, copy_out
from .prefill import CHUNK, LOGITS_CHUNK, Prefill
from .state import GpuState, on_gpu
from .step import Step, embed_rows
from .weights import upload

log = logging.getLogger(__name__)


class EmbeddingRoom:
    """Room for embeddings on the GPU, see `GpuEmbeddings`: rows (seq, d_model) float32, contiguous."""

    def __init__(self, block: DeviceBlock, n: int, d_model: int) -> None:
        """Take the beginning of a block."""
        self._block, self.shape = block, (n, d_model)

    @property
    def address(self) -> int:
        """Where they begin."""
        return self._block.address

    def __len__(self) -> int:
        """Return seq."""
        return self.shape[0]


class CudaDecoder:
    """A bundle's decoder, run by a GPU. See `Decoder`.

    Attributes:
        name: "cuda".
        config: sizes.
    """

    name, activations, runs_on = "cuda", "float32", "cuda"
    same_bits_however_cut = False  # many tokens are float16 products, one is not

    def __init__(self, source: Bundle | Weights, options: DecoderOptions = DEFAULT_OPTIONS) -> None:
        """Copy the weights to the first GPU.

        Args:
            source: an opened bundle, or weights in memory.
            options: threads mean nothing here, and activations stay as they are: rounding them further would save no memory.

        Raises:
            BundleError: a tensor does not fit. MachineError: there is no GPU, or it has no room, how much was needed is said.
        """
        weights = Weights.of(source)
        self.config, self._origin, self._needed = weights.config, weights.origin, 0
        self._room: DeviceBlock | None = None
        self._alone = threading.Lock()  # buffers, pinned memory and the spare state are there once
        with self._failures("opening the decoder"):
            gpu = first_gpu()
            gpu.enter()
            self._needed = DeviceMemory.of(weights.config, weights.recipe, gpu.multiprocessors).total
            gpu.load()  # takes memory: before what is free is counted
            free, _ = gpu.memory()
            if self._needed > free:
                raise MachineError(self._no_room("opening the decoder"))
            self._queue = Queue(gpu, gpu.take_stream())
            weakref.finalize(self, self._queue.leave).atexit = False
            file = source.path(DECODER) if isinstance(source, Bundle) else None
            self._weights = upload(weights, self._queue, file)
            self._step, self._prefill = Step(self._weights, self._queue), Prefill(self._weights, self._queue)
            self._spare = GpuState.blank(self.config, self._queue)
            self._step.prepare(self._spare)
        if options.activations_of(weights.recipe) == "int8":
            log.info("activations stay 16 bits wide on a GPU: nearer to the float model than the recipe's int8")
        log.info("decoder on %s: %s", gpu.title, self.describe())

    def describe(self) -> str:
        """Say which kernels run what."""
        reason = self._prefill.why_not
        return "cuda; prompts in chunks" if reason is None else f"cuda; prompts token by token: {reason}"

    @property
    def stream(self) -> int:
        """See `GpuDecoder.stream`."""
        return int(self._queue.stream)

    def embedding_room(self, n: int) -> EmbeddingRoom:
        """See `GpuDecoder.embedding_room`."""
        nbytes = 4 * n * self.config.d_model
        if self._room is None or self._room.nbytes < nbytes:
            with self._working(f"making room for {n} embeddings"):
                self._room = DeviceBlock(self._queue.gpu, nbytes, f"{n} embeddings")
        return EmbeddingRoom(self._room, n, self.config.d_model)

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        try:
            yield
        except CudaError as error:
            if error.lacks_memory:
                raise MachineError(self._no_room(doing)) from error
            raise MachineError(f"{doing}: {error}") from error  # also of what a vision engine left on the stream

    @contextmanager
    def _working(self, doing: str) -> Iterator[None]:
        """Work on the decoder's stream; it is done when the block ends. Its failures are MachineErrors."""
        with self._alone, self._failures(doing):
            self._queue.gpu.enter()
            yield
            self._queue.wait(doing)

    @contextmanager
    def _working_on(self, state: DecoderState, doing: str) -> Iterator[GpuState]:
        state.require_writable(self.config)
        with self._working(doing), on_gpu(state, self._spare) as there:
            yield there
            self._queue.wait(doing)  # before a host's state is filled

    def _no_room(self, doing: str) -> str:
        gpu, there = first_gpu(), "how much is free it does not say"
        with suppress(MachineError):
            free, total = gpu.memory()
            there = f"{free / 1e9:.2f} of {total / 1e9:.2f} GB are free"
        return (
            f"{doing}: {gpu.name} has no room; the decoder of {self._origin} needs about {self._needed / 1e9:.2f} GB, {there}: "
            "end other programs on the GPU, export with fewer bits, or take --device cpu"
        )

    def new_state(self, like: DecoderState | None = None) -> GpuState:
        """See `Decoder.new_state`; it is on the GPU."""
        if like is not None:
            like.require(self.config)
        with self._working("making a state"):
            blank = GpuState.blank(self.config, self._queue)
            if like is not None:
                blank.fill(like)
        return blank

    def embed(self, tokens: list[int]) -> np.ndarray:
        """See `Decoder.embed`."""
        ids = checked_tokens(tokens, self.config).astype(np.int32)
        n, matrix, rotation = len(ids), self._weights.embedding, self._weights.residual_rotation
        width = matrix.read_width
        rows = np.empty((n, width), np.float32)
        if not n:
            return rows[:, : self.config.d_model]
        with self._working("looking tokens up"):
            queue = self._queue
            block = DeviceBlock(queue.gpu, ids.nbytes + 512 + 2 * rows.nbytes, f"{n} tokens' embeddings")
            there = Address(block.address + (ids.nbytes + 255) // 256 * 256)
            copy_in(block.address, ids, queue.stream, "copying tokens to the GPU")
            embed_rows(queue, matrix, Address(block.address), n, there)
            if rotation is not None:
                turned = Address(there + rows.nbytes)
                rotation.rotate(queue, there, turned, n, back=True)
                there = turned
            copy_out(rows, there, queue.stream, "copying embeddings to the host")
            queue.wait("looking tokens up")
        return np.ascontiguousarray(rows[:, : self.config.d_model])

    def _checked(self, embeddings: np.ndarray | EmbeddingRoom) -> np.ndarray | EmbeddingRoom:
        if not isinstance(embeddings, EmbeddingRoom):
            return checked_embeddings(embeddings, self.config)
        require_positions(embeddings.shape, self.config)
        return embeddings

    def _enter(self, embeddings: np.ndarray | EmbeddingRoom, begin: int, n: int, to: Address, spare: Address) -> None:
        """Enqueue n embeddings (n, d_model) float32 to a place on the GPU, in the basis the weights are stored in."""
        queue, rotation, doing = self._queue, self._weights.residual_rotation, "copying embeddings"
        first = to if rotation is None else spare
        if isinstance(embeddings, EmbeddingRoom):
            row_bytes = 4 * self.config.d_model
            copy_across(first, embeddings.address + begin * row_bytes, n * row_bytes, queue.stream, doing)
        else:
            copy_in(first, embeddings[begin : begin + n], queue.stream, doing)
        if rotation is not None:
            rotation.rotate(queue, first, to, n)

    def prefill(self, embeddings: np.ndarray | EmbeddingRoom, state: DecoderState) -> np.ndarray:
        """See `Decoder.prefill`; embeddings may be on the GPU."""
        embeddings = self._checked(embeddings)
        with self._working_on(state, f"reading {len(embeddings)} tokens") as there:
            for residual, n in self._read(embeddings, there):
                last = Address(residual + 4 * self.config.d_model * (n - 1))
            self._step.head(last)
            return self._step.logits_on_host()

    def forward(self, embeddings: np.ndarray | EmbeddingRoom, state: DecoderState) -> np.ndarray:
        """See `Decoder.forward`; embeddings may be on the GPU."""
        embeddings = self._checked(embeddings)
        logits, at = np.empty((len(embeddings), self.config.vocab), np.float32), 0
        with self._working_on(state, f"reading {len(embeddings)} tokens") as there:
            for residual, n in self._read(embeddings, there):
                for begin in range(0, n, LOGITS_CHUNK):
                    scored = min(LOGITS_CHUNK, n - begin)
                    self._score(residual, begin, scored, logits[at : at + scored])
                    at += scored
        return logits

    def _score(self, residual: Address, begin: int, n: int, logits: np.ndarray) -> None:
        doing = "copying logits to the host"
        if self._prefill.why_not is None:
            room = self._prefill.room(n)  # the one that was read into
            self._prefill.logits(room, begin, n)
            copy_out(logits, room.logits, self._queue.stream, doing)
            self._queue.wait(doing)
            return
        for i in range(n):
            self._step.head(Address(residual + 4 * self.config.d_model * (begin + i)))
            logits[i] = self._step.logits_on_host()

    def _read(self, embeddings: np.ndarray | EmbeddingRoom, state: GpuState) -> Iterator[tuple[Address, int]]:
        """Read embeddings chunk by chunk; yield the residual stream behind the last layer, (n, d_model) float32, and n."""
        one_by_one = self._prefill.why_not is not None
        chunk = 1 if one_by_one else CHUNK
        for begin in range(0, len(embeddings), chunk):
            n = min(chunk, len(embeddings) - begin)
            if one_by_one:
                self._enter(embeddings, begin, n, self._step.residual, self._step.spare_row)
                self._step.read_residual(state)
                yield self._step.residual, n
                continue
            room = self._prefill.room(n)
            self._enter(embeddings, begin, n, room.residual, room.entering)
            self._prefill.run_layers(room, n, state)
            yield room.residual, n

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """See `Decoder.step`."""
        (checked,) = checked_tokens([token], self.config)
        with self._working_on(state, "reading a token") as there:
            self._step.read(int(checked), there)
            return self._step.logits_on_host()

    def generate(
        self, logits: np.ndarray, state: DecoderState, end_id: int, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[int]:
        """See `generate.generate`, which comes here: tokens are chosen where the logits are.

        Others may use the decoder between two tokens.
        """
        rng, token = np.random.default_rng(sampling.seed), -1
        for index in range(max_new_tokens):
            with self._working_on(state, "generating a token") as there:
                if index:
                    self._step.read(token, there)
                else:
                    self._step.put_logits(logits)
                token = self._step.choose(sampling, rng.random() if sampling.temperature else 0.0)
            if token == end_id:
                return
            yield token
