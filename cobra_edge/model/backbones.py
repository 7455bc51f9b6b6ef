"""Registries of vision and language backbones, by the ids in a run directory's config.json.

Source: cobra/models/materialize.py and cobra/models/backbones/ of the original, and timm's encoder configurations.
"""

from __future__ import annotations

import re

import msgspec

from ..errors import InputError
from ..formats.model_config import EncoderConfig, MambaConfig, VisionConfig
from ..terminal.suggestions import near_matches

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

_DINOV2_L = EncoderConfig("vit_large_patch14_reg4_dinov2.lvd142m", 1024, 14, 24, 5, IMAGENET_MEAN, IMAGENET_STD)
_SIGLIP_SO, _SIGLIP_SO_224 = (
    EncoderConfig(f"vit_so400m_patch14_siglip_{size}", 1152, 14, 27, 0, HALF, HALF) for size in (384, 224)
)
_SIGLIP_B = {n: EncoderConfig(f"vit_base_patch16_siglip_{n}", 768, 16, 12, 0, HALF, HALF) for n in (224, 256, 384)}
_IN1K_L = EncoderConfig("vit_large_patch16_224.augreg_in21k_ft_in1k", 1024, 16, 24, 1, HALF, HALF)
# OpenAI's weights were trained with a cheaper GELU than timm's default for the architecture. Cobra's code selects it if CLIP is
# the only encoder, and not if it is combined with DINOv2. A checkpoint must be run as it was trained.
_QUICK_GELU: dict[str, int | float | str] = {"act_layer": "quick_gelu"}
_CLIP_L_336 = EncoderConfig("vit_large_patch14_clip_336.openai", 1024, 14, 24, 1, CLIP_MEAN, CLIP_STD)
_CLIP_L = EncoderConfig("vit_large_patch14_clip_224.openai", 1024, 14, 24, 1, CLIP_MEAN, CLIP_STD, _QUICK_GELU)
_CLIP_B = EncoderConfig("vit_base_patch16_clip_224.openai", 768, 16, 12, 1, CLIP_MEAN, CLIP_STD, _QUICK_GELU)
_DINO_MINI = EncoderConfig(
    "vit_small_patch14_reg4_dinov2.lvd142m",
    128,
    14,
    5,
    5,
    IMAGENET_MEAN,
    IMAGENET_STD,
    {"embed_dim": 128, "depth": 5, "num_heads": 4, "init_values": 1.0},
)
_SIGLIP_MINI = EncoderConfig(
    "vit_so400m_patch14_siglip_384",
    128,
    14,
    5,
    0,
    HALF,
    HALF,
    {"embed_dim": 128, "depth": 5, "num_heads": 4, "mlp_ratio": 4.0},
)


# Every backbone of Cobra's code, dinosiglip-vit-so-224px, which prismatic-vlms adds, and those of cobra-mini and its variants.
VISION_BACKBONES: dict[str, VisionConfig] = {
    v.backbone_id: v
    for v in (
        VisionConfig("dinosiglip-vit-so-384px", (_DINOV2_L, _SIGLIP_SO), 384),
        VisionConfig("dinosiglip-vit-so-224px", (_DINOV2_L, _SIGLIP_SO_224), 224),
        VisionConfig("dinoclip-vit-l-336px", (_DINOV2_L, _CLIP_L_336), 336),
        VisionConfig("siglip-vit-so400m-384px", (_SIGLIP_SO,), 384),
        VisionConfig("siglip-vit-so400m", (_SIGLIP_SO_224,), 224),
        *(VisionConfig(f"siglip-vit-b16-{size}px", (encoder,), size) for size, encoder in _SIGLIP_B.items()),
        VisionConfig("dinov2-vit-l", (_DINOV2_L,), 224),
        VisionConfig("clip-vit-b", (_CLIP_B,), 224),
        VisionConfig("clip-vit-l", (_CLIP_L,), 224),
        VisionConfig("clip-vit-l-336px", (msgspec.structs.replace(_CLIP_L_336, overrides=_QUICK_GELU),), 336),
        VisionConfig("in1k-vit-l", (_IN1K_L,), 224),
        VisionConfig("dinosiglip-vit-mini-112px", (_DINO_MINI, _SIGLIP_MINI), 112),
        VisionConfig("siglip-vit-mini-112px", (_SIGLIP_MINI,), 112),
        VisionConfig("dinov2-vit-mini-112px", (_DINO_MINI,), 112),
    )
}


def vision_backbone(backbone_id: str, resize_strategy: str = "resize-naive") -> VisionConfig:
    """Return the vision backbone of a registry id. Raises InputError with near matches, or for an unsupported strategy."""
    if backbone_id not in VISION_BACKBONES:
        raise InputError(f"unknown vision_backbone_id {backbone_id!r}{near_matches(backbone_id, VISION_BACKBONES)}")
    if backbone_id == "clip-vit-b" and resize_strategy != "resize-naive":
        # timm resizes its images to 248 pixels and crops 224; all other encoders get the whole square.
        raise InputError(
            f"clip-vit-b with image_resize_strategy {resize_strategy!r} is not supported, because its crop differs; "
            "expected 'resize-naive'"
        )
    return VISION_BACKBONES[backbone_id]


def featurizers(vision: VisionConfig) -> list[str]:
    """Return the prefix of each encoder's tensor names in a checkpoint with fine-tuned encoders."""
    if len(vision.encoders) == 1:
        return ["featurizer."]
    families = ("dino", "siglip", "clip")
    return [f"{next(f for f in families if f in e.timm_name)}_featurizer." for e in vision.encoders]


class LanguageBackbone(msgspec.Struct, frozen=True):
    """Properties of an llm_backbone_id: expected sizes, prompt style, hub repository of the tokenizer."""

    mamba: MambaConfig
    prompt_style: str
    tokenizer_hub_id: str | None


def published_mamba(d_model: int, n_layer: int) -> MambaConfig:
    """Return the sizes of a Mamba published by state-spaces; dt_rank is ceil(d_model / 16)."""
    return MambaConfig(d_model, n_layer, vocab=50280, d_inner=2 * d_model, d_state=16, d_conv=4, dt_rank=-(-d_model // 16))


_SIZES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
_NEOX_TOKENIZER, _ZEPHYR_TOKENIZER = "EleutherAI/gpt-neox-20b", "xiuyul/mamba-2.8b-zephyr"
# Suffixes of a size's name: the tuning, which determines prompt style and tokenizer.
_TUNED = {
    "": ("base", _NEOX_TOKENIZER),
    "-hf": ("base", _NEOX_TOKENIZER),
    "-slimpj": ("base", _NEOX_TOKENIZER),
    "-zephyr": ("zephyr", _ZEPHYR_TOKENIZER),
}
LANGUAGE_BACKBONES: dict[str, LanguageBackbone] = {
    f"mamba-{size}{tuned}": LanguageBackbone(published_mamba(*shape), style, tokenizer)
    for size, shape in reversed(_SIZES.items())
    for tuned, (style, tokenizer) in _TUNED.items()
} | {
    "mamba-mini-zephyr": LanguageBackbone(
        MambaConfig(d_model=256, n_layer=4, vocab=512, d_inner=512, d_state=16, d_conv=4, dt_rank=16), "zephyr", None
    )
}


def language_backbone(backbone_id: str) -> LanguageBackbone:
    """Return the language backbone of a registry id. Raises InputError with near matches."""
    if backbone_id not in LANGUAGE_BACKBONES:
        if re.match(r"mamba[-_]?2(?![.\d])", backbone_id.lower()):
            raise InputError(f"llm_backbone_id {backbone_id!r} is a Mamba-2; {ONLY_MAMBA_1}")
        raise InputError(f"unknown llm_backbone_id {backbone_id!r}{near_matches(backbone_id, LANGUAGE_BACKBONES)}")
    return LANGUAGE_BACKBONES[backbone_id]


ONLY_MAMBA_1 = "only Mamba-1 decoders are supported, as in every published Cobra; use a checkpoint with one"
HUB_REPOSITORY = "han1997/cobra"
# Models that the original's load() downloads, by name; each is a directory of the repository.
HUB_MODELS = {"cobra+3b": "cobra+3b", "Cobra-DINOSigLIP 3B": "cobra+3b"}
# Training configurations of the original, for which load() has no weights.
TRAINING_CONFIGURATIONS = ("cobra-one-epoch+3b", "cobra-base+3b", "cobra-siglip+3b", "cobra-ldpnet+3b")
