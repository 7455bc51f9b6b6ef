"""Which of onnxruntime's execution providers runs the graph: a table that explains itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnxruntime

from ..precision import PrecisionName


@dataclass(frozen=True)
class Provider:
    """One row: onnxruntime's name for it, what people call it, where it runs, and what to install."""

    name: str
    title: str
    device: str
    comes_with: str


# In order of preference.
PROVIDERS = (
    Provider("NvTensorRTRTXExecutionProvider", "TensorRT for RTX", "cuda", "a build of onnxruntime with TensorRT for RTX"),
    Provider("TensorrtExecutionProvider", "TensorRT", "cuda", "onnxruntime-gpu, beside TensorRT"),
    Provider("CUDAExecutionProvider", "CUDA", "cuda", "onnxruntime-gpu"),
    Provider("CPUExecutionProvider", "CPU", "cpu", "onnxruntime"),
)


def eligible(device: str) -> tuple[list[Provider], list[str]]:
    """Return the providers that this onnxruntime has for a device, best first, and why each other one is out.

    Args:
        device: "auto", "cpu" or "cuda".
    """
    built_in, takes, refused = set(onnxruntime.get_available_providers()), [], []
    for provider in PROVIDERS:
        if device not in ("auto", provider.device):
            refused.append(f"{provider.title}: runs on {provider.device}, {device} was asked for")
        elif provider.name not in built_in:
            refused.append(f"{provider.title}: this onnxruntime has it not; it comes with {provider.comes_with}")
        else:
            takes.append(provider)
    return takes, refused


def provider_options(provider: Provider, precision: PrecisionName, cache: str) -> Mapping[str, str]:
    """Return options for a provider: those that build engines keep them in a directory, and take the graph's own types."""
    if provider.name == "TensorrtExecutionProvider":
        options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": cache}
        types = {"fp16": {"trt_fp16_enable": "1"}, "int8": {"trt_int8_enable": "1"}}
        return options | types.get(precision, {})
    if provider.name == "CUDAExecutionProvider":
        return {"use_tf32": "0"}  # it would round the products of a float32 graph to 10 bits
    if provider.name == "NvTensorRTRTXExecutionProvider":
        return {"nv_runtime_cache_path": cache}
    return {}
