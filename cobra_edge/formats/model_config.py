"""The architecture of a Cobra model: its vision encoders, its projector and the sizes of its Mamba decoder.

Sizes have two sources. The registry ids in `config.json` name the vision backbone and the prompt style. All other numbers are
inferred from the tensor shapes of the checkpoint, so that no second download is needed. The two are checked against each other.
Nothing here imports torch: the bundle reader uses the same classes on a device.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from ..errors import InputError
from ..terminal.suggestions import near_matches

ProjectorKind = Literal["linear", "gelu-mlp", "fused-gelu-mlp", "fused-ldpnet"]
# Matched on the ending of arch_specifier, in this order: "fused-gelu-mlp" also ends in "gelu-mlp".
PROJECTOR_KINDS: tuple[ProjectorKind, ...] = ("fused-gelu-mlp", "fused-ldpnet", "gelu-mlp", "linear")
_LDPNET_GRID = 14
RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
PROMPT_STYLES = ("zephyr", "base")

# A model's name is used in paths.
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")

# Bounds of plausible sizes; a manifest outside them is corrupt or hostile.
_BOUNDS = {
    "d_model": (8, 16384),
    "n_layer": (1, 512),
    "vocab": (8, 1 << 20),
    "d_inner": (8, 65536),
    "d_state": (1, 256),
    "d_conv": (2, 8),
    "dt_rank": (1, 4096),
}


_ENCODER_BOUNDS = {"embed_dim": (1, 16384), "patch_size": (1, 4096), "depth": (1, 512), "n_prefix": (0, 1024)}
_MOST_PATCHES = 16384  # a square of 1792 pixels in patches of 14


class EncoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One Vision Transformer, under timm's name.

    `overrides` are arguments for timm that change the named architecture: sizes of encoders that are on no hub, or the
    activation that CLIP was trained with. Features are taken after block `depth - 2`; later blocks are never run.
    """

    timm_name: str
    embed_dim: int
    patch_size: int
    depth: int
    n_prefix: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    overrides: dict[str, int | float | str] = {}

    @property
    def on_hub(self) -> bool:
        """Whether timm's hub has weights for this architecture; not if `overrides` change its sizes."""
        return self.overrides.keys() <= {"act_layer"}


class VisionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The vision backbone: encoders in the order their features are concatenated, and the square input in pixels."""

    backbone_id: str
    encoders: tuple[EncoderConfig, ...]
    image_size: int

    def __post_init__(self) -> None:
        """Raise InputError when a size is out of bounds or the encoders' grids differ."""
        if not self.encoders or len(self.encoders) > 4:
            raise InputError(f"model config: {len(self.encoders)} vision encoders, expected 1 to 4")
        grids = set()
        for e in self.encoders:
            for name, (low, high) in _ENCODER_BOUNDS.items():
                if not low <= getattr(e, name) <= high:
                    raise InputError(
                        f"model config: encoder {e.timm_name[:80]}: {name} is {getattr(e, name)}, expected {low} to {high}"
                    )
            if not 8 <= self.image_size <= 4096 or e.patch_size > self.image_size:
                raise InputError(
                    f"model config: encoder {e.timm_name[:80]}: images of {self.image_size} pixels in patches of "
                    f"{e.patch_size}, expected images of 8 to 4096 and smaller patches"
                )
            grids.add(self.image_size // e.patch_size)
        if len(grids) > 1:
            raise InputError(f"model config: encoders with grids of {sorted(grids)} patches cannot be concatenated")

        if self.n_patches > _MOST_PATCHES:
            raise InputError(f"model config: {self.n_patches} patches per image, expected at most {_MOST_PATCHES}")

    @property
    def feature_dim(self) -> int:
        """Width of the concatenated patch features."""
        return sum(e.embed_dim for e in self.encoders)

    @property
    def n_patches(self) -> int:
        """Patches per image; the same for every encoder."""
        return (self.image_size // self.encoders[0].patch_size) ** 2


class MambaConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a Mamba-1 language model (Gu and Dao 2023, section 3.4); names as in the glossary."""

    d_model: int
    n_layer: int
    vocab: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    norm_eps: float = 1e-5
    tied: bool = True

    def __post_init__(self) -> None:
        """Raise InputError when a size is out of bounds."""
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"model config: {name} is {value}, expected an integer in {low}..{high}")
        if not 0 < self.norm_eps < 1:
            raise InputError(f"model config: norm_eps is {self.norm_eps!r}, expected a number in (0, 1)")

    @property
    def n_parameters(self) -> int:
        """Number of weights of the decoder; a tied head is counted once."""
        mixer = 2 * self.d_inner * self.d_model + self.d_inner * self.d_model
        mixer += (self.dt_rank + 2 * self.d_state) * self.d_inner + self.d_inner * (self.dt_rank + 1)
        mixer += self.d_inner * (self.d_conv + 1) + self.d_inner * (self.d_state + 1)
        head = self.vocab * self.d_model * (1 if self.tied else 2)
        return self.n_layer * (mixer + self.d_model) + self.d_model + head

    @property
    def is_large(self) -> bool:
        """Whether the float model takes minutes on a processor for what a small one does in seconds: from 10⁹ weights."""
        return self.n_parameters >= 10**9


class CobraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A complete Cobra. `vision` and `projector` are None for a text-only Mamba."""

    model_id: str
    vision: VisionConfig | None
    projector: ProjectorKind | None
    mamba: MambaConfig
    image_resize_strategy: str = "resize-naive"
    prompt_style: str = "zephyr"
    max_length: int = 2048

    def __post_init__(self) -> None:
        """Raise InputError if a choice is unknown or the parts do not match."""
        if not _MODEL_ID.fullmatch(self.model_id):
            raise InputError(
                f"model config: model_id {self.model_id[:140]!r} is invalid; expected letters, digits, '.', '_', '+' and '-'"
            )
        if (self.vision is None) != (self.projector is None):
            raise InputError("model config: expected both a vision backbone and a projector, or neither")
        if self.image_resize_strategy not in RESIZE_STRATEGIES:
            raise InputError(
                f"unknown image_resize_strategy {self.image_resize_strategy!r}"
                f"{near_matches(self.image_resize_strategy, RESIZE_STRATEGIES)}"
            )
        if self.prompt_style not in PROMPT_STYLES:
            raise InputError(f"unknown prompt style {self.prompt_style!r}{near_matches(self.prompt_style, PROMPT_STYLES)}")
        if not 16 <= self.max_length <= 1 << 20:
            raise InputError(f"model config: max_length is {self.max_length!r}, expected an integer in 16..{1 << 20}")

    @property
    def n_visual_tokens(self) -> int:
        """Number of visual embeddings before the text; 0 for a text-only model."""
        if self.vision is None:
            return 0
        return ldpnet_grid(self.vision.n_patches) ** 2 if self.projector == "fused-ldpnet" else self.vision.n_patches


def ldpnet_grid(n_patches: int) -> int:
    """Return the side of the token grid that fused-ldpnet pools n_patches to: 14, or half of a patch grid smaller than that.

    No published backbone has a smaller one; 14 is half of the 27 at 384 pixels, rounded up.
    """
    side = math.isqrt(n_patches)
    return _LDPNET_GRID if side >= _LDPNET_GRID else -(-side // 2)


def projector_kind(arch_specifier: str) -> ProjectorKind:
    """Return the projector that an arch_specifier such as "no-align+fused-gelu-mlp" or "no-align-fused-gelu-mlp" ends with.

    Raises:
        InputError: no known projector; near matches are listed.
    """
    for kind in PROJECTOR_KINDS:
        if re.search(rf"(?:^|[+_-]){kind}$", arch_specifier):
            return kind
    hint = near_matches(arch_specifier.split("+")[-1], PROJECTOR_KINDS)
    raise InputError(f"unknown projector in arch_specifier {arch_specifier!r}{hint}")


def decoder_shapes(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the decoder, in order of use; a tied head has no tensor of its own.

    Names are those of the state-spaces layout, which the published Cobra carries under the prefix `llm.`.
    """
    c = config
    mixer = {
        "in_proj.weight": (2 * c.d_inner, c.d_model),
        "conv1d.weight": (c.d_inner, 1, c.d_conv),
        "conv1d.bias": (c.d_inner,),
        "x_proj.weight": (c.dt_rank + 2 * c.d_state, c.d_inner),
        "dt_proj.weight": (c.d_inner, c.dt_rank),
        "dt_proj.bias": (c.d_inner,),
        "A_log": (c.d_inner, c.d_state),
        "D": (c.d_inner,),
        "out_proj.weight": (c.d_model, c.d_inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (c.vocab, c.d_model)}
    for i in range(c.n_layer):
        shapes[f"backbone.layers.{i}.norm.weight"] = (c.d_model,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes["backbone.norm_f.weight"] = (c.d_model,)
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab, c.d_model)
    return shapes


def projector_shapes(kind: ProjectorKind, feature_dim: int, d_model: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a projector, with the names of the published checkpoints."""
    wide = 4 * feature_dim
    widths: dict[str, dict[str, tuple[int, int]]] = {
        "linear": {"projector": (d_model, feature_dim)},
        "gelu-mlp": {"projector.0": (d_model, feature_dim), "projector.2": (d_model, d_model)},
        "fused-gelu-mlp": {
            "projector.0": (wide, feature_dim),
            "projector.2": (d_model, wide),
            "projector.4": (d_model, d_model),
        },
        "fused-ldpnet": {"projector.0": (wide, feature_dim), "projector.2": (d_model, wide)},
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, n_in) in widths[kind].items():
        shapes |= {f"{name}.weight": (out, n_in), f"{name}.bias": (out,)}
    if kind == "fused-ldpnet":
        shapes |= {"projector.4.peg.0.weight": (d_model, 1, 3, 3), "projector.4.peg.0.bias": (d_model,)}
    return shapes
