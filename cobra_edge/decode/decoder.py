"""What every decoder backend offers, and the state they carry."""

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
    """What a decoder remembers of all tokens so far: a fixed size, whatever their number.

    Attributes:
        n_tokens: positions read so far, visual and text.
    """

    def __init__(self, conv: np.ndarray, ssm: np.ndarray, n_tokens: int = 0) -> None:
        """Keep the arrays, which decoders write into; what they hold is said at the properties of their names."""
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
        """Return what is saved, by the names of `layout` and in its order."""
        return {"conv": self.conv, "ssm": self.ssm, "n_tokens": np.array([self.n_tokens], np.int32)}

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `conv` and `ssm`."""
        return self.conv.shape, self.ssm.shape

    def require(self, config: MambaConfig) -> None:
        """Raise InputError when this is not a state of such a model."""
        conv, ssm, _ = (t.shape for t in self.layout(config))
        if self.shapes != (conv, ssm):
            raise InputError(
                f"the state is of another model: conv {self.shapes[0]} and ssm {self.shapes[1]}, this one's are "
                f"{conv} and {ssm}; look at the image again"
            )

    def require_writable(self, config: MambaConfig) -> None:
        """Raise InputError when this is not a state of such a model that a decoder can write into."""
        self.require(config)
        self._require_memory()

    def _require_memory(self) -> None:
        """Raise InputError where the arrays are not what decoders write into."""
        for name, array in (("conv", self._conv), ("ssm", self._ssm)):
            if array.dtype != np.float32 or not array.flags.c_contiguous or not array.flags.writeable:
                kind = "writable" if array.flags.writeable else "read-only"
                order = "contiguous" if array.flags.c_contiguous else "strided"
                raise InputError(
                    f"the state's {name} is {kind} {order} {array.dtype}, expected writable contiguous float32; "
                    "take a state of `new_state`, `copy` or `load`"
                )

    @contextmanager
    def in_host_memory(self) -> Iterator[DecoderState]:
        """Give this state as one whose arrays can be written into in place: itself, where it lies there."""
        yield self

    def copy(self) -> DecoderState:
        """Return an independent copy, where this one is."""
        return self.host()

    def save(self, file: Path) -> None:
        """Write the state as safetensors."""
        from safetensors.numpy import save_file

        save_file(self.parts(), file)

    def host(self) -> DecoderState:
        """Return an independent copy in the host's memory."""
        conv, ssm = (np.array(a, np.float32, order="C") for a in (self.conv, self.ssm))
        return DecoderState(conv, ssm, self.n_tokens)

    @classmethod
    def load(cls, file: Path, config: MambaConfig) -> DecoderState:
        """Read a saved state. Raises BundleError when it is not one of this model, InputError when its values mean nothing."""
        saved = read_tensors(file, cls.layout(config))
        if not (np.isfinite(saved["conv"]).all() and np.isfinite(saved["ssm"]).all()):
            raise InputError(f"{file}: holds NaN or infinity; look at the image again")
        n_tokens = int(saved["n_tokens"][0])
        if n_tokens < 0:
            raise InputError(f"{file}: says that it has read {n_tokens} tokens; look at the image again")
        return cls(saved["conv"], saved["ssm"], n_tokens)


@dataclass(frozen=True)
class DecoderOptions:
    """How a decoder is to run; a backend without such a choice passes over it.

    Attributes:
        threads: of a CPU backend; None for one a physical core, or fewer where OMP_NUM_THREADS says so.
        activations: "float32" leaves what enters a product as it is; "int8" rounds it where the weights are quantized, one
            scale a group: faster, at a drift of its own; None does what the recipe says.
    """

    threads: int | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        """Raise InputError for values that mean nothing."""
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise InputError(f"threads is {self.threads}, expected 1 to 1024")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            raise InputError(f"unknown activations {self.activations!r}{near_matches(self.activations, ACTIVATIONS)}")

    def activations_of(self, recipe: Recipe) -> str:
        """Return the form of activations for a decoder of that recipe, "float32" or "int8"."""
        return self.activations or recipe.activations


DEFAULT_OPTIONS = DecoderOptions()


@dataclass(frozen=True, eq=False)
class Weights:
    """What a decoder is made of: a bundle's tensors, or some in memory.

    Attributes:
        config: sizes.
        recipe: its rotations are those of the tensors; how each is stored, the tensors say themselves.
        tensors: by name, as `Bundle.decoder_tensors` gives them.
        origin: where they come from, for messages.
    """

    config: MambaConfig
    recipe: Recipe
    tensors: Mapping[str, np.ndarray | QuantizedTensor]
    origin: str

    @classmethod
    def of(cls, source: Bundle | Weights) -> Weights:
        """Return a bundle's weights, mapped; weights as they are. Raises BundleError when a tensor does not fit."""
        if isinstance(source, Weights):
            return source
        manifest = source.manifest
        return cls(manifest.model.mamba, manifest.recipe, source.decoder_tensors(), str(source.directory))


class Decoder(Protocol):
    """A quantized Mamba that runs. States are changed in place; logits are float32.

    Every backend takes and refuses the same (`decode.arguments`), before anything is computed, and leaves the state as it was:

    * A token is an integer from 0 to vocab - 1; a negative one counts from nowhere. No tokens have no embeddings, (0, d_model).
    * Embeddings are (seq, d_model) of floating point, seq at least 1: after nothing there are no logits. NaN and infinity in
      them are carried through to the logits and the state, whatever form activations have.
    * A state is one of this model's sizes, its arrays float32, contiguous and writable. One of another backend, in whichever
      memory, is read from and written to there.

    Whatever is not so raises InputError.
    """

    name: str
    config: MambaConfig

    @property
    def runs_on(self) -> str:
        """The kind of device: "cpu" or "cuda"."""
        ...

    @property
    def same_bits_however_cut(self) -> bool:
        """Whether tokens leave the same bits behind, read at once, in pieces, or one by one."""
        ...

    @property
    def activations(self) -> str:
        """What enters a product with codes: "float32" where it is left as it is, "int8" where it is rounded."""
        ...

    def new_state(self, like: DecoderState | None = None) -> DecoderState:
        """Return the state before the first token, or an independent copy of another one, where this decoder keeps its own.

        Raises InputError for one of another model.
        """
        ...

    def embed(self, tokens: list[int]) -> np.ndarray:
        """Look up tokens; returns (seq, d_model) float32. Raises InputError for a token outside the vocabulary."""
        ...

    def prefill(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """Read embeddings (seq, d_model) float32; returns the logits after the last one, (vocab,). Raises as above."""
        ...

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """Read one token; returns the logits after it, (vocab,). Raises InputError, see above."""
        ...

    def forward(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """Read embeddings (seq, d_model) float32; returns logits at every position, (seq, vocab). Raises as above."""
        ...


class GpuEmbeddings(Protocol):
    """Embeddings that lie on a GPU, or room for them."""

    @property
    def address(self) -> int:
        """Where they begin: contiguous float32, on a multiple of 256 bytes, as TensorRT wants it."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(seq, d_model)."""
        ...

    def __len__(self) -> int:
        """Return seq."""
        ...


class GpuDecoder(Decoder, Protocol):
    """A decoder on a CUDA GPU, which reads embeddings where a vision engine left them."""

    @property
    def stream(self) -> int:
        """The cudaStream_t that all its work is put on; it stays as long as the process."""
        ...

    def embedding_room(self, n: int) -> GpuEmbeddings:
        """Return room for n embeddings, (n, d_model), that no work under way reads; what is put there is read by `prefill`.

        The next call may return the same room.
        """
        ...

    def prefill(self, embeddings: np.ndarray | GpuEmbeddings, state: DecoderState) -> np.ndarray:
        """See `Decoder.prefill`; embeddings on the GPU are read once the work before on the stream is done."""
        ...

    def forward(self, embeddings: np.ndarray | GpuEmbeddings, state: DecoderState) -> np.ndarray:
        """See `Decoder.forward`, and `prefill`."""
        ...


def gpu_decoder(decoder: Any) -> GpuDecoder | None:
    """Return a decoder as one on a GPU, or None where it has no stream (no attribute of that name, or None)."""
    return cast(GpuDecoder, decoder) if getattr(decoder, "stream", None) is not None else None
