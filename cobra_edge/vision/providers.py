"""Which of onnxruntime's execution providers runs the graph: a table that explains itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnxruntime

from ..formats.precision import PrecisionName


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


def provider_options(provider: Provider, precision: PrecisionName, cache: str, stream: int | None = None) -> Mapping[str, str]:
    """Return options for a provider.

    Args:
        provider: a row of the table.
        precision: of the graph, whose own types are taken.
        cache: a directory, in which those that build engines keep them.
        stream: a cudaStream_t that a GPU's provider is to work on. 0, which onnxruntime takes for none, and None: its own.
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
        return {"use_tf32": "0"}  # it would round the products of a float32 graph to 10 bits
    if provider.name == "NvTensorRTRTXExecutionProvider":
        return {"nv_runtime_cache_path": cache}
    return {}
