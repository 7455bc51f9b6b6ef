"""The protocol of decoder backends, and the decoder state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ..bundle.reader import Bundle
from ..errors import InputError
from ..formats.model_config import MambaConfig
from ..formats.packing import QuantizedTensor
from ..formats.recipe import Recipe, StoredTensor
from ..formats.safetensors_file import read_tensors
from ..terminal.suggestions import near_matches

ACTIVATIONS = ("float32", "int8")


class DecoderState:
    """The decoder's state, of a size independent of the number of tokens.

    Attributes:
        n_tokens: positions read so far, visual and text.
    """

    def __init__(self, conv: np.ndarray, ssm: np.ndarray, n_tokens: int = 0) -> None:
        """Wrap the arrays `conv` and `ssm` (see the properties), which decoders update in place."""
        self._conv, self._ssm = conv, ssm
        self.n_tokens = n_tokens

    @property
    def conv(self) -> np.ndarray:
        """The last inputs of each causal convolution, newest last: (n_layer, d_inner, d_conv) float32."""
        return self._conv

    @property
    def ssm(self) -> np.ndarray:
        """The recurrent state, (n_layer, d_inner, d_state) float32."""
        return self._ssm

    @classmethod
    def zeros(cls, config: MambaConfig) -> DecoderState:
        """Return the state before the first token."""
        return cls(
            np.zeros((config.n_layer, config.d_inner, config.d_conv), np.float32),
            np.zeros((config.n_layer, config.d_inner, config.d_state), np.float32),
        )

    @staticmethod
    def layout(config: MambaConfig) -> list[StoredTensor]:
        """Return the tensors of a saved state."""
        return [
            StoredTensor("conv", "float32", (config.n_layer, config.d_inner, config.d_conv)),
            StoredTensor("ssm", "float32", (config.n_layer, config.d_inner, config.d_state)),
            StoredTensor("n_tokens", "int32", (1,)),
        ]

    def parts(self) -> dict[str, np.ndarray]:
        """Return the saved arrays: conv and ssm float32, n_tokens (1,) int32, with names, order and shapes of `layout`."""
        return {"conv": self.conv, "ssm": self.ssm, "n_tokens": np.array([self.n_tokens], np.int32)}

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `conv` and `ssm`."""
        return self.conv.shape, self.ssm.shape

    def require(self, config: MambaConfig) -> None:
        """Raise InputError if the shapes do not match the model."""
        conv, ssm, _ = (t.shape for t in self.layout(config))
        if self.shapes != (conv, ssm):
            raise InputError(
                f"the state belongs to another model: conv {self.shapes[0]} and ssm {self.shapes[1]}, expected "
                f"{conv} and {ssm}; compute it again from the image"
            )

    def require_writable(self, config: MambaConfig) -> None:
        """Raise InputError if the shapes do not match the model, or the arrays cannot be updated in place."""
        self.require(config)
        self._require_memory()

    def _require_memory(self) -> None:
        """Raise InputError unless the arrays are writable, contiguous float32."""
        for name, array in (("conv", self._conv), ("ssm", self._ssm)):
            if array.dtype != np.float32 or not array.flags.c_contiguous or not array.flags.writeable:
                kind = "writable" if array.flags.writeable else "read-only"
                order = "contiguous" if array.flags.c_contiguous else "strided"
                raise InputError(
                    f"the state's {name} is {kind} {order} {array.dtype}, expected writable contiguous float32; "
                    "use a state from `new_state`, `copy` or `load`"
                )

    @contextmanager
    def in_host_memory(self) -> Iterator[DecoderState]:
        """Yield a state whose arrays are in host memory and can be updated in place: this one, if it is there."""
        yield self

    def copy(self) -> DecoderState:
        """Return an independent copy in the same memory."""
        return self.host()

    def save(self, file: Path) -> None:
        """Write the state as safetensors."""
        from safetensors.numpy import save_file

        save_file(self.parts(), file)

    def host(self) -> DecoderState:
        """Return an independent copy in host memory."""
        conv, ssm = (np.array(a, np.float32, order="C") for a in (self.conv, self.ssm))
        return DecoderState(conv, ssm, self.n_tokens)

    @classmethod
    def load(cls, file: Path, config: MambaConfig) -> DecoderState:
        """Load a saved state. Raises BundleError if it does not belong to this model, InputError for invalid values."""
        saved = read_tensors(file, cls.layout(config))
        if not (np.isfinite(saved["conv"]).all() and np.isfinite(saved["ssm"]).all()):
            raise InputError(f"{file}: holds NaN or infinity; compute the state again from the image")
        n_tokens = int(saved["n_tokens"][0])
        if n_tokens < 0:
            raise InputError(f"{file}: has read {n_tokens} tokens, expected 0 or more; compute the state again from the image")
        return cls(saved["conv"], saved["ssm"], n_tokens)


@dataclass(frozen=True)
class DecoderOptions:
    """Options of a decoder; backends ignore those they do not support.

    Attributes:
        threads: of a CPU backend; None for one per physical core, or fewer if OMP_NUM_THREADS is lower.
        activations: "float32" leaves the inputs of matmuls unchanged; "int8" quantizes them if the weights are quantized, with
            one scale per group: faster, with additional drift; None follows the recipe.
    """

    threads: int | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        """Raise InputError for invalid values."""
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise InputError(f"threads is {self.threads}, expected 1 to 1024")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            raise InputError(f"unknown activations {self.activations!r}{near_matches(self.activations, ACTIVATIONS)}")

    def activations_of(self, recipe: Recipe) -> str:
        """Return the activations for a recipe, "float32" or "int8"."""
        return self.activations or recipe.activations


DEFAULT_OPTIONS = DecoderOptions()


@dataclass(frozen=True, eq=False)
class Weights:
    """A decoder's weights: a bundle's tensors, or tensors in memory.

    Attributes:
        config: sizes of the decoder.
        recipe: defines the rotations; the storage of each tensor is a property of the tensor.
        tensors: by name, as in `Bundle.decoder_tensors`.
        origin: their source, for messages.
    """

    config: MambaConfig
    recipe: Recipe
    tensors: Mapping[str, np.ndarray | QuantizedTensor]
    origin: str

    @classmethod
    def of(cls, source: Bundle | Weights) -> Weights:
        """Return a bundle's weights, memory-mapped, or `Weights` unchanged. Raises BundleError if a tensor does not match."""
        if isinstance(source, Weights):
            return source
        manifest = source.manifest
        return cls(manifest.model.mamba, manifest.recipe, source.decoder_tensors(), str(source.directory))


class Decoder(Protocol):
    """A quantized Mamba decoder. States are updated in place; logits are float32.

    Every backend checks its arguments in the same way (`decode.arguments`), before it computes anything or changes the state:

    * A token is an integer from 0 to vocab - 1. An empty list of tokens gives embeddings of shape (0, d_model).
    * Embeddings are (seq, d_model) of a float dtype, with seq at least 1. NaN and infinity in them propagate to the logits and
      the state, whatever the activations.
    * A state has this model's shapes; its arrays are float32, contiguous and writable. A state of another backend is read and
      updated in its own memory.

    Anything else raises InputError. Threads may share a decoder, each with states of its own.
    """

    name: str
    config: MambaConfig

    @property
    def runs_on(self) -> str:
        """The kind of device: "cpu" or "cuda"."""
        ...

    @property
    def same_bits_however_cut(self) -> bool:
        """Whether the result is bit-identical if tokens are read at once, in chunks, or one by one."""
        ...

    @property
    def activations(self) -> str:
        """Inputs of quantized matmuls: "float32" if they are unchanged, "int8" if they are quantized."""
        ...

    def new_state(self, like: DecoderState | None = None) -> DecoderState:
        """Return the initial state, or an independent copy of `like`, in this decoder's memory.

        Raises InputError if `like` belongs to another model.
        """
        ...

    def embed(self, tokens: list[int]) -> np.ndarray:
        """Look up tokens; returns (seq, d_model) float32. Raises InputError for a token outside the vocabulary."""
        ...

    def prefill(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """Read embeddings (seq, d_model) float32; returns the logits of the last one, (vocab,) float32. Raises InputError."""
        ...

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """Read one token; returns the logits after it, (vocab,) float32. Raises InputError."""
        ...

    def forward(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """Read embeddings (seq, d_model) float32; returns logits at every position, (seq, vocab) float32. Raises InputError."""
        ...


class GpuEmbeddings(Protocol):
    """A buffer for embeddings in GPU memory."""

    @property
    def address(self) -> int:
        """Device address: contiguous float32, aligned to 256 bytes, as TensorRT requires."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the buffer, (seq, d_model)."""
        ...

    def __len__(self) -> int:
        """Return seq."""
        ...


class GpuDecoder(Decoder, Protocol):
    """A decoder on a CUDA GPU, which can read embeddings from GPU memory."""

    @property
    def stream(self) -> int:
        """The cudaStream_t of all its work; it exists as long as the process."""
        ...

    def embedding_room(self, n: int) -> GpuEmbeddings:
        """Return a buffer for n embeddings, (n, d_model), not in use by pending work, for `prefill` to read.

        The next call may return the same buffer.
        """
        ...

    def prefill(self, embeddings: np.ndarray | GpuEmbeddings, state: DecoderState) -> np.ndarray:
        """See `Decoder.prefill`; embeddings on the GPU are read after all earlier work on the stream."""
        ...

    def forward(self, embeddings: np.ndarray | GpuEmbeddings, state: DecoderState) -> np.ndarray:
        """See `Decoder.forward` and `prefill`."""
        ...


def gpu_decoder(decoder: Any) -> GpuDecoder | None:
    """Return the decoder if it is on a GPU (has a `stream` that is not None), else None."""
    return cast(GpuDecoder, decoder) if getattr(decoder, "stream", None) is not None else None
