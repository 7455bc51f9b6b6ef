"""The decoder on an NVIDIA GPU: Triton kernels over the bundle's own codes.

One token is a CUDA graph of a few launches a layer, between buffers that never move; activations are float32 there, and the
state is found through an address, so that one graph steps any state. Many tokens go through tensor cores in float16 and a scan
in float32. Everything runs on a stream of the decoder's own; a method has done its work when it returns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...bundle.reader import Bundle
from ...errors import MachineError
from ...formats.packing import QuantizedTensor
from ..arguments import checked_embeddings, checked_tokens, require_positions
from ..decoder import DEFAULT_OPTIONS, DecoderOptions, DecoderState, Weights
from ..sampling import Sampling
from .driver import gpu_title
from .kernels.embedding import look_up
from .kernels.fused import choose_convolution, choose_scan
from .kernels.gemm import multiply_many
from .kernels.rotation import rotate_many
from .prefill import CHUNK, Sequential, bytes_per_token, normed_for_head, run_layers
from .sampling import Chooser
from .state import GpuState, on_gpu, on_stream
from .step import Step, captured
from .weights import GpuWeights

log = logging.getLogger(__name__)

_LOGITS_CHUNK = 256  # positions whose logits are on the GPU together


@dataclass(frozen=True, eq=False)
class EmbeddingRoom:
    """Room for embeddings on the GPU, see `GpuEmbeddings`: rows (seq, d_model) float32, contiguous."""

    rows: torch.Tensor

    @property
    def address(self) -> int:
        """Where they begin."""
        return self.rows.data_ptr()

    @property
    def shape(self) -> tuple[int, int]:
        """(seq, d_model)."""
        seq, d_model = self.rows.shape
        return seq, d_model

    def __len__(self) -> int:
        """Return seq."""
        return len(self.rows)


class CudaDecoder:
    """A bundle's decoder, run by a GPU. See `Decoder`.

    Attributes:
        name: "triton".
        config: sizes.
        device: where it runs.
    """

    name, activations = "triton", "float32"

    def __init__(
        self, source: Bundle | Weights, options: DecoderOptions = DEFAULT_OPTIONS, device: torch.device | None = None
    ) -> None:
        """Copy the weights to the GPU.

        Args:
            source: an opened bundle, or weights in memory.
            options: threads mean nothing here, and activations are left float: rounding them would save no memory.
            device: the first GPU; a processor for tests with Triton's interpreter, where nothing is captured; "meta" to record
                launches.

        Raises:
            BundleError: a tensor does not fit. MachineError: the GPU has no room, how much was needed is said.
        """
        weights = Weights.of(source)
        self.config = weights.config
        self.device = torch.device("cuda", 0) if device is None else device
        self._origin, self._needed = weights.origin, needed_bytes(weights)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with self._gpu("opening the decoder"):
            _require_room(self.device, self._needed, weights.origin)
            self._weights = GpuWeights.of(weights, self.device)
            convolution = choose_convolution(self.device, self.config.d_inner, self.config.d_conv)
            self._sequential = Sequential(convolution, choose_scan(self.device))
            self._step = Step(self._weights)
            self._chooser = Chooser(self._step, self._stream)
            self._spare = self.new_state()
        self._room: EmbeddingRoom | None = None
        if options.activations_of(weights.recipe) == "int8":
            log.info("activations stay float on a GPU: nearer to the float model than the recipe's int8")
        log.info("decoder on %s: %s", gpu_title(self.device), self.describe())

    same_bits_however_cut = False  # many tokens are float16 products, one is not

    @property
    def runs_on(self) -> str:
        """See `Decoder.runs_on`."""
        return self.device.type

    def describe(self) -> str:
        """Say which kernels run what."""
        return f"triton; convolution {self._sequential.convolution.name}, scan {self._sequential.scan.name}"

    @property
    def stream(self) -> int | None:
        """See `GpuDecoder.stream`; None where there is no GPU."""
        return None if self._stream is None else int(self._stream.cuda_stream)

    def embedding_room(self, n: int) -> EmbeddingRoom:
        """See `GpuDecoder.embedding_room`."""
        if self._room is None or len(self._room) < n:
            with self._gpu(f"making room for {n} embeddings"):
                self._room = EmbeddingRoom(torch.empty(n, self.config.d_model, dtype=torch.float32, device=self.device))
        return EmbeddingRoom(self._room.rows[:n])

    @contextmanager
    def _gpu(self, doing: str) -> Iterator[None]:
        """Work on the decoder's stream; it is done when the block ends. Its failures are MachineErrors."""
        try:
            with torch.inference_mode(), on_stream(self._stream):
                yield
                if self._stream is not None:
                    self._stream.synchronize()
        except torch.OutOfMemoryError as error:
            raise MachineError(_no_room(self.device, self._needed, self._origin, doing)) from error
        except torch.AcceleratorError as error:  # also of what a vision engine left on the stream
            raise MachineError(f"{doing}: the GPU failed ({str(error).splitlines()[0]}); start again") from error

    @contextmanager
    def _working_on(self, state: DecoderState, doing: str) -> Iterator[GpuState]:
        state.require_writable(self.config)
        with self._gpu(doing), on_gpu(state, self._spare) as there:
            if self._stream is not None and there.stream not in (None, self._stream):
                self._stream.wait_stream(there.stream)
            yield there

    def new_state(self, like: DecoderState | None = None) -> GpuState:
        """See `Decoder.new_state`; it is on the GPU."""
        blank = GpuState.blank(self.config, self.device, self._stream)
        if like is not None:
            like.require(self.config)
            blank.fill(like)
        return blank

    def embed(self, tokens: list[int]) -> np.ndarray:
        """See `Decoder.embed`."""
        with self._gpu("looking tokens up"):
            rows = self._embedded(tokens)
            if self._weights.rotates_residual and len(rows):
                stored, rows = rows, torch.empty_like(rows)
                rotate_many(stored, rows, back=True)
            return _on_host(rows)

    def _embedded(self, tokens: list[int]) -> torch.Tensor:
        """Return rows of the embedding as they are stored, (seq, d_model) float32."""
        ids = torch.from_numpy(checked_tokens(tokens, self.config)).to(self.device)
        rows = torch.empty(len(ids), self.config.d_model, dtype=torch.float32, device=self.device)
        if len(ids):
            look_up(self._weights.embedding, ids, rows)
        return rows

    def _checked(self, embeddings: np.ndarray | EmbeddingRoom) -> np.ndarray | EmbeddingRoom:
        if not isinstance(embeddings, EmbeddingRoom):
            return checked_embeddings(embeddings, self.config)
        require_positions(embeddings.shape, self.config)
        return embeddings

    def _chunks(self, embeddings: np.ndarray | EmbeddingRoom) -> Iterator[torch.Tensor]:
        """Yield copies of embeddings on the GPU, (seq, d_model) float32, in the basis the weights are stored in."""
        for begin in range(0, len(embeddings), CHUNK):
            yield self._entering(embeddings, slice(begin, begin + CHUNK))

    def _entering(self, embeddings: np.ndarray | EmbeddingRoom, part: slice) -> torch.Tensor:
        if isinstance(embeddings, EmbeddingRoom):
            there = embeddings.rows[part].clone()
        else:
            there = torch.tensor(embeddings[part], device=self.device)
        if not self._weights.rotates_residual:
            return there
        rotated = torch.empty_like(there)
        rotate_many(there, rotated)
        return rotated

    def prefill(self, embeddings: np.ndarray | EmbeddingRoom, state: DecoderState) -> np.ndarray:
        """See `Decoder.prefill`; embeddings may be on the GPU."""
        embeddings = self._checked(embeddings)
        with self._working_on(state, f"reading {len(embeddings)} tokens") as there:
            for residual in self._chunks(embeddings):
                run_layers(self._weights, self._sequential, residual, there)
            self._step.head(residual[-1:])
            logits = _on_host(self._step.logits)
        return logits

    def forward(self, embeddings: np.ndarray | EmbeddingRoom, state: DecoderState) -> np.ndarray:
        """See `Decoder.forward`; embeddings may be on the GPU."""
        embeddings = self._checked(embeddings)
        logits, at = np.empty((len(embeddings), self.config.vocab), np.float32), 0
        with self._working_on(state, f"reading {len(embeddings)} tokens") as there:
            for residual in self._chunks(embeddings):
                run_layers(self._weights, self._sequential, residual, there)
                for part in normed_for_head(self._weights, residual).split(_LOGITS_CHUNK):
                    scored = torch.empty(len(part), self.config.vocab, dtype=torch.float32, device=self.device)
                    multiply_many(self._weights.head, part, scored)
                    logits[at : at + len(part)] = _on_host(scored)
                    at += len(part)
        return logits

    @cached_property
    def _replay(self) -> Callable[[], None]:
        """One token's launches, captured when they are first needed."""
        nobodys = self.new_state()
        self._step.point_at(nobodys)
        self._step.token.zero_()
        return captured(self._step.run, self._stream)

    def _read(self, token: int, state: GpuState) -> None:
        """Enqueue the reading of a token; the logits after it are the step's then."""
        replay = self._replay  # capturing leaves another token and state behind
        self._step.point_at(state)
        self._step.token.fill_(token)
        replay()
        state.n_tokens += 1

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """See `Decoder.step`."""
        (checked,) = checked_tokens([token], self.config)
        with self._working_on(state, "reading a token") as there:
            self._read(int(checked), there)
            return _on_host(self._step.logits)

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
                    self._read(token, there)
                else:
                    self._step.logits.copy_(torch.tensor(logits))
                token = self._chooser(sampling, rng.random() if sampling.temperature else 0.0)
            if token == end_id:
                return
            yield token


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy, also of what is on a processor: buffers are written again."""
    return tensor.to("cpu", copy=True).numpy()


def needed_bytes(weights: Weights) -> int:
    """Return what a decoder takes on a GPU: weights, two states, and the buffers of the longest chunk of a prompt."""
    c = weights.config
    stored = sum(
        v.codes.nbytes + v.scales.nbytes if isinstance(v, QuantizedTensor) else v.nbytes for v in weights.tensors.values()
    )
    states = 2 * 4 * c.n_layer * c.d_inner * (c.d_conv + c.d_state)
    return stored + states + CHUNK * bytes_per_token(c) + _LOGITS_CHUNK * 4 * c.vocab


def _no_room(device: torch.device, needed: int, origin: str, doing: str) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"{doing}: {torch.cuda.get_device_name(device)} has no room; the decoder of {origin} needs about "
        f"{needed / 1e9:.2f} GB, {free / 1e9:.2f} of {total / 1e9:.2f} GB are free: end other programs on the GPU, "
        "export with fewer bits, or take --device cpu"
    )


def _require_room(device: torch.device, needed: int, origin: str) -> None:
    """Raise MachineError when a GPU has less memory free than a decoder needs."""
    if device.type != "cuda":
        return
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > torch.cuda.mem_get_info(device)[0] + reusable:
        raise MachineError(_no_room(device, needed, origin, "opening the decoder"))
