"""Table of onnxruntime's execution providers, with the reasons for refusing each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnxruntime

from ..formats.precision import PrecisionName


@dataclass(frozen=True)
class Provider:
    """One row: onnxruntime's name, a readable title, the device, and what to install."""

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
    """Return the providers available for a device, best first, and the reason for each other one.

    Args:
        device: "auto", "cpu" or "cuda".
    """
    built_in, takes, refused = set(onnxruntime.get_available_providers()), [], []
    for provider in PROVIDERS:
        if device not in ("auto", provider.device):
            refused.append(f"{provider.title}: runs on {provider.device}, {device} was requested")
        elif provider.name not in built_in:
            refused.append(f"{provider.title}: this onnxruntime does not include it; it comes with {provider.comes_with}")
        else:
            takes.append(provider)
    return takes, refused


def provider_options(provider: Provider, precision: PrecisionName, cache: str, stream: int | None = None) -> Mapping[str, str]:
    """Return options for a provider.

    Args:
        provider: a row of the table.
        precision: of the graph, which defines all types.
        cache: directory for the engines of providers that build some.
        stream: cudaStream_t for a GPU provider; None, or 0 (which onnxruntime reads as none), for its own.
    """
    options = _own_options(provider, precision, cache)
    if stream and provider.device == "cuda":
        options |= {"has_user_compute_stream": "1", "user_compute_stream": str(stream)}
    return options


def _own_options(provider: Provider, precision: PrecisionName, cache: str) -> dict[str, str]:
    if provider.name == "TensorrtExecutionProvider":
        options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": cache}
        types = {"fp16": {"trt_fp16_enable": "1"}, "int8": {"trt_int8_enable": "1"}}
        return options | types.get(precision, {})
    if provider.name == "CUDAExecutionProvider":
        return {"use_tf32": "0"}  # TF32 would round the matmuls of a float32 graph to 10 bits
    if provider.name == "NvTensorRTRTXExecutionProvider":
        return {"nv_runtime_cache_path": cache}
    return {}
