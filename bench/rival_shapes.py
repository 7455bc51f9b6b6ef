"""Decoders of the systems that Cobra is compared with, `rivals.toml`: what they hold, store and read.

A transformer is stored in llama.cpp's Q4_0: blocks of 32 weights with a float16 scale, 4.5 bits a weight. Like llama.cpp's own
tool, the head is kept in Q6_K (6.5625 bits); a tied embedding is the head. Vectors are float32. The KV cache is float16.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from cobra_edge.errors import InputError
from cobra_edge.files.parsing import ParseError, parse_toml
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.model.backbones import published_mamba
from cobra_edge.terminal.suggestions import near_matches

RIVALS = Path(__file__).with_name("rivals.toml")
Format = Literal["Q4_0", "Q6_K", "F32"]
# Weights and bytes of a block.
BLOCKS: dict[Format, tuple[int, int]] = {"Q4_0": (32, 18), "Q6_K": (256, 210), "F32": (1, 4)}
_HALF = 2  # bytes of a float16
SHORT_CONVOLUTION = 3  # positions that a convolution of lfm2 sees


class RivalTensor(NamedTuple):
    """A tensor of a GGUF: (out, in) or (n,), and how it is stored."""

    shape: tuple[int, ...]
    format: Format

    @property
    def bytes(self) -> int:
        """Its size."""
        weights, size = BLOCKS[self.format]
        return math.prod(self.shape) // weights * size


class _Plan:
    """Tensors of a GGUF as they are named one after another."""

    def __init__(self, *, bias: bool) -> None:
        """Take whether matrices and norms have a bias."""
        self.tensors: dict[str, RivalTensor] = {}
        self._bias = bias

    def matrix(self, name: str, rows: int, columns: int, stored: Format = "Q4_0", bias: bool | None = None) -> None:
        self.tensors[f"{name}.weight"] = RivalTensor((rows, columns), stored)
        if self._bias if bias is None else bias:
            self.tensors[f"{name}.bias"] = RivalTensor((rows,), "F32")

    def norm(self, name: str, n: int) -> None:
        for part in ("weight", "bias") if self._bias else ("weight",):
            self.tensors[f"{name}.{part}"] = RivalTensor((n,), "F32")


class Decoder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One shape.

    Attributes:
        architecture: llama.cpp's name of it.
        layers, width, vocab: n_layer, d_model and tokens.
        tied: whether embedding and head are one matrix.
        heads, kv_heads, head_size, feed_forward: of a transformer.
        attention_layers: those that have attention, the others a short convolution; None for all.
        rope_sections: of a rotary embedding in several dimensions.
    """

    architecture: Literal["mamba", "llama", "phi2", "qwen2vl", "qwen3vl", "lfm2"]
    layers: int
    width: int
    vocab: int
    tied: bool
    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    feed_forward: int = 0
    attention_layers: tuple[int, ...] | None = None
    rope_sections: tuple[int, int, int, int] | None = None

    @property
    def mamba(self) -> MambaConfig:
        """Sizes of a Mamba."""
        return msgspec.structs.replace(published_mamba(self.width, self.layers), vocab=self.vocab)

    def attends(self, layer: int) -> bool:
        """Return whether this layer has attention."""
        return self.attention_layers is None or layer in self.attention_layers

    def cache_bytes(self, context: int) -> int:
        """Return the bytes of a KV cache of that many tokens."""
        attending = sum(self.attends(i) for i in range(self.layers))
        return 2 * attending * context * self.kv_heads * self.head_size * _HALF

    def tensors(self) -> dict[str, RivalTensor]:
        """Return the tensors of its GGUF by name."""
        plan, width = _Plan(bias=self.architecture == "phi2"), self.width
        plan.matrix("token_embd", self.vocab, width, "Q6_K" if self.tied else "Q4_0", bias=False)
        plan.norm("token_embd_norm" if self.architecture == "lfm2" else "output_norm", width)
        if not self.tied:
            plan.matrix("output", self.vocab, width, "Q6_K")
        for i in range(self.layers):
            layer = f"blk.{i}."
            plan.norm(layer + "attn_norm", width)
            if self.architecture == "mamba":
                self._mixer(plan, layer)
                continue
            if self.attends(i):
                self._attention(plan, layer)
            else:
                plan.tensors[layer + "shortconv.conv.weight"] = RivalTensor((width, SHORT_CONVOLUTION), "F32")
                plan.matrix(layer + "shortconv.in_proj", 3 * width, width)
                plan.matrix(layer + "shortconv.out_proj", width, width)
            if self.architecture != "phi2":  # whose two halves share a norm, and whose network has no gate
                plan.norm(layer + "ffn_norm", width)
                plan.matrix(layer + "ffn_gate", self.feed_forward, width)
            plan.matrix(layer + "ffn_up", self.feed_forward, width)
            plan.matrix(layer + "ffn_down", width, self.feed_forward)
        return plan.tensors

    def _mixer(self, plan: _Plan, layer: str) -> None:
        m = self.mamba
        plan.matrix(layer + "ssm_in", 2 * m.d_inner, m.d_model)
        plan.matrix(layer + "ssm_x", m.dt_rank + 2 * m.d_state, m.d_inner)
        plan.matrix(layer + "ssm_dt", m.d_inner, m.dt_rank, bias=True)
        plan.matrix(layer + "ssm_out", m.d_model, m.d_inner)
        for name, shape in (
            ("ssm_conv1d.weight", (m.d_inner, m.d_conv)),
            ("ssm_conv1d.bias", (m.d_inner,)),
            ("ssm_a", (m.d_inner, m.d_state)),
            ("ssm_d", (m.d_inner,)),
        ):
            plan.tensors[layer + name] = RivalTensor(shape, "F32")

    def _attention(self, plan: _Plan, layer: str) -> None:
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        if self.architecture == "phi2":
            plan.matrix(layer + "attn_qkv", queries + 2 * keys, self.width)
        else:
            for name, rows in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
                plan.matrix(layer + name, rows, self.width, bias=self.architecture == "qwen2vl")
        if self.architecture in ("qwen3vl", "lfm2"):
            plan.norm(layer + "attn_q_norm", self.head_size)
            plan.norm(layer + "attn_k_norm", self.head_size)
        plan.matrix(layer + "attn_output", self.width, queries)

    def weights_bytes(self) -> int:
        """Return the bytes of its tensors in a GGUF."""
        return sum(t.bytes for t in self.tensors().values())

    def token_bytes(self, context: int) -> int:
        """Return the bytes that llama.cpp reads for a token: weights, but no embedding that is not the head, and the cache."""
        unread = 0 if self.tied else self.tensors()["token_embd.weight"].bytes
        return self.weights_bytes() - unread + self.cache_bytes(context)


class System(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A vision-language model: the name of its decoder, tokens of a 640 x 480 picture, longest context of its training."""

    decoder: str
    image_tokens: int
    trained_context: int


class Rivals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`rivals.toml`."""

    decoders: dict[str, Decoder]
    systems: dict[str, System]

    def system(self, name: str) -> System:
        """Return a system. Raises InputError, with similar names, if it is unknown."""
        if name not in self.systems:
            raise InputError(f"unknown rival {name!r}{near_matches(name, self.systems)}")
        return self.systems[name]


def read_rivals(file: Path = RIVALS) -> Rivals:
    """Read the table. Raises InputError for a file that is not one, or a system whose decoder is not in it."""
    try:
        found = msgspec.convert(parse_toml(file.read_bytes()), Rivals)
    except (ParseError, msgspec.ValidationError) as error:
        raise InputError(f"{file}: {error}") from error
    for name, system in found.systems.items():
        if system.decoder not in found.decoders:
            similar = near_matches(system.decoder, found.decoders)
            raise InputError(f"{file}: {name}: decoder {system.decoder!r} is not there{similar}")
    return found
