"""The registries of Cobra's code: vision and language backbones by the ids that a run directory's config.json names.

Source: cobra/models/materialize.py and cobra/models/backbones/ of the original, and timm's data sheets of its encoders.
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
# OpenAI's weights were trained with a cheaper GELU than the architecture has by default. Cobra's code asks for it where CLIP
# stands alone, and not where it is fused with DINOv2; a checkpoint has to be run as it was trained.
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


# Every backbone of Cobra's code, and dinosiglip-vit-so-224px, which prismatic-vlms has besides.
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
    )
}


def vision_backbone(backbone_id: str, resize_strategy: str = "resize-naive") -> VisionConfig:
    """Return the vision backbone of a registry id. Raises InputError with near matches, or for a strategy that does not fit."""
    if backbone_id not in VISION_BACKBONES:
        raise InputError(f"unknown vision_backbone_id {backbone_id!r}{near_matches(backbone_id, VISION_BACKBONES)}")
    if backbone_id == "clip-vit-b" and resize_strategy != "resize-naive":
        # timm scales its images to 248 pixels and cuts 224 out; all other encoders are given the whole square.
        raise InputError(
            f"clip-vit-b with image_resize_strategy {resize_strategy!r} is not supported, its crop is another; "
            "expected 'resize-naive'"
        )
    return VISION_BACKBONES[backbone_id]


def featurizers(vision: VisionConfig) -> list[str]:
    """Return what the names of each encoder's tensors begin with in a checkpoint whose encoders were trained along."""
    if len(vision.encoders) == 1:
        return ["featurizer."]
    families = ("dino", "siglip", "clip")
    return [f"{next(f for f in families if f in e.timm_name)}_featurizer." for e in vision.encoders]


class LanguageBackbone(msgspec.Struct, frozen=True):
    """What a run directory's llm_backbone_id promises: sizes to check tensors against, prompt style, tokenizer's hub id."""

    mamba: MambaConfig
    prompt_style: str
    tokenizer_hub_id: str | None


def _published(d_model: int, n_layer: int) -> MambaConfig:
    """Return a Mamba as state-spaces publishes them; dt_rank is the sixteenth part of d_model, rounded up."""
    return MambaConfig(d_model, n_layer, vocab=50280, d_inner=2 * d_model, d_state=16, d_conv=4, dt_rank=-(-d_model // 16))


_SIZES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
_NEOX_TOKENIZER, _ZEPHYR_TOKENIZER = "EleutherAI/gpt-neox-20b", "xiuyul/mamba-2.8b-zephyr"
# What the name of a size may be followed by: how the model was tuned, which decides prompts and tokenizer.
_TUNED = {
    "": ("base", _NEOX_TOKENIZER),
    "-hf": ("base", _NEOX_TOKENIZER),
    "-slimpj": ("base", _NEOX_TOKENIZER),
    "-zephyr": ("zephyr", _ZEPHYR_TOKENIZER),
}
LANGUAGE_BACKBONES: dict[str, LanguageBackbone] = {
    f"mamba-{size}{tuned}": LanguageBackbone(_published(*shape), style, tokenizer)
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


ONLY_MAMBA_1 = "this project runs Mamba-1 decoders, as every published Cobra has; take a checkpoint of one"
HUB_REPOSITORY = "han1997/cobra"
# What the original's load() downloads, by its names; each is a directory of the repository.
HUB_MODELS = {"cobra+3b": "cobra+3b", "Cobra-DINOSigLIP 3B": "cobra+3b"}
# What the original trains by these names: configurations, of which load() has no weights.
TRAINING_CONFIGURATIONS = ("cobra-one-epoch+3b", "cobra-base+3b", "cobra-siglip+3b", "cobra-ldpnet+3b")
