"""Decode: tokens a second of the decoder, as a share of what the machine's memory allows.

A decoding step reads every weight once and does little with each, so the time of a token cannot fall below the bytes of the
decoder over the read bandwidth. That bandwidth is measured in the same run, between the rounds, on the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from rich.progress import Progress

from ..bundle import (
    CARD,
    DECODER,
    GOLDEN,
    MANIFEST,
    PROMPT,
    SCHEMA_VERSION,
    TOKENIZER,
    Bundle,
    Manifest,
    PromptFile,
    Source,
    file_entries,
    staged_directory,
)
from ..decode.cpu import CpuDecoder, physical_cores
from ..decode.decoder import ACTIVATIONS, DecoderOptions, DecoderState
from ..decode.numpy_reference import NumpyDecoder
from ..errors import MachineError
from ..memory import decoder_bytes, plan_memory, state_bytes
from ..model.config import CobraConfig, MambaConfig
from ..recipe import StoredTensor, round_to_nearest_recipe, stored_tensors
from ..regress.golden import GoldenLine, write_golden
from ..resources import MINI
from ..scheme import scheme_named
from ..targets import target_named
from ..tensor_file import TensorFileWriter
from ..text import END_OF_TEXT
from ..version import __version__

_BANDWIDTH_BYTES = 1 << 30
_GATE_TOKENS = 6
_GATE_RELATIVE_RMS = {"float32": 1e-3, "int8": 0.3}  # of 64 random layers, which forget nothing and forgive nothing


def random_bundle(mamba: MambaConfig, scheme: str, directory: Path, bar: Progress) -> Bundle:
    """Make a text-only bundle of random codes, once: the sizes are exact, the answers mean nothing.

    Args:
        mamba: the decoder's shape.
        scheme: of its matrices.
        directory: where; a bundle that is there is opened instead.
        bar: for progress.
    """
    if (directory / MANIFEST).is_file():
        return Bundle.open(directory)
    config = CobraConfig("random", None, None, mamba)
    recipe, _ = round_to_nearest_recipe(mamba, scheme_named(scheme))
    plan = [t for entries in stored_tensors(mamba, recipe).values() for t in entries]
    task, rng = bar.add_task("random decoder", total=len(plan)), np.random.default_rng(0)
    with staged_directory(directory, force=False, needed_bytes=decoder_bytes(config, recipe)) as stage:
        with TensorFileWriter(stage / DECODER, plan) as writer:
            for tensor in plan:
                writer.write(tensor.name, _random(tensor, rng))
                bar.advance(task)
        (stage / TOKENIZER).write_bytes((MINI / TOKENIZER).read_bytes())
        (stage / PROMPT).write_bytes(msgspec.json.encode(PromptFile(config.prompt_style, END_OF_TEXT, 0)))
        line = GoldenLine(np.array([1, 2], np.int32), 1, np.zeros((1, mamba.vocab), np.float32), None, None)
        write_golden(stage / GOLDEN, [line])
        (stage / CARD).write_text("Random weights, for measurements only.\n", encoding="utf-8")
        manifest = Manifest(
            SCHEMA_VERSION, __version__, Source("random", "0" * 64), config, "cpu", recipe, file_entries(stage),
            plan_memory(config, recipe, target_named("cpu")), None,
        )  # fmt: skip
        (stage / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return Bundle.open(directory)


def _random(tensor: StoredTensor, rng: np.random.Generator) -> np.ndarray:
    """Return values that keep a deep decoder finite; codes are uniform, so a scale stands for 1/√in of the weights."""
    if tensor.dtype == "uint8":
        return rng.integers(0, 256, tensor.shape, np.uint8)
    if tensor.name.endswith("A_log"):
        values = np.broadcast_to(np.log(np.arange(1, tensor.shape[1] + 1)), tensor.shape)
    elif tensor.name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
        values = np.ones(tensor.shape)
    elif tensor.name.endswith(".scales"):
        values = np.full(tensor.shape, 1e-4 if "out_proj" in tensor.name else 4e-4)
    else:
        values = 0.02 * rng.standard_normal(tensor.shape, np.float32)
    return values.astype(tensor.dtype)


def check(bundle: Bundle) -> dict[str, float]:
    """Compare both forms of activations with the numpy decoder before anything is timed.

    Returns:
        The relative RMS distance of the logits by form.

    Raises:
        MachineError: a distance beyond its limit; no figure of this decoder would mean anything.
    """
    tokens, found = list(range(5, 5 + _GATE_TOKENS)), {}
    truth = NumpyDecoder(bundle)
    expected = truth.forward(truth.embed(tokens), truth.new_state())
    for activations in ACTIVATIONS:
        decoder = CpuDecoder(bundle, DecoderOptions(activations=activations))
        got = decoder.forward(decoder.embed(tokens), decoder.new_state())
        found[activations] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        if not found[activations] <= _GATE_RELATIVE_RMS[activations]:
            raise MachineError(
                f"the native decoder with {activations} activations is {found[activations]:.2e} away from the numpy one, at "
                f"most {_GATE_RELATIVE_RMS[activations]:.0e} is allowed: no speed is reported; run the tests"
            )
    return found


def measure_decode(
    bundle: Bundle,
    options: DecoderOptions,
    prompt_tokens: list[int],
    new_tokens: int,
    contexts: list[int],
    rounds: int,
    bar: Progress,
) -> dict[str, Any]:
    """Time opening, prefill, decoding and the memory's bandwidth, one after the other in each round.

    Args:
        bundle: whose decoder.
        options: threads and activations.
        prompt_tokens: lengths to prefill.
        new_tokens: steps that are timed together.
        contexts: how many tokens have been read before the steps; the state has one size, so it should not matter.
        rounds: how often each is timed; medians and extremes are returned.
        bar: for progress.

    Returns:
        Figures by name; rates in tokens a second, `share` of the bandwidth bound measured in the same round.
    """
    distances = check(bundle)
    began = time.perf_counter()
    decoder = CpuDecoder(bundle, options)
    open_ms = (time.perf_counter() - began) * 1e3
    words = np.ones(_BANDWIDTH_BYTES // 8, np.uint64)
    threads = options.threads or physical_cores()
    mamba = bundle.manifest.model.mamba
    size = bundle.manifest.files[DECODER].bytes + 2 * state_bytes(bundle.manifest.model)  # the state is read and written
    rng = np.random.default_rng(1)
    states = {n: _after(decoder, n, rng, bar) for n in contexts}
    task = bar.add_task("rounds", total=rounds)
    seen: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    for _ in range(rounds):
        bandwidth = _BANDWIDTH_BYTES / _seconds(lambda: _read(words, threads))
        keep("read_gb_s", bandwidth / 1e9)
        for n in prompt_tokens:
            rows = decoder.embed(rng.integers(0, mamba.vocab, n).tolist())
            fresh = decoder.new_state()
            keep(f"prefill_{n}_tok_s", n / _seconds(lambda rows=rows, fresh=fresh: decoder.prefill(rows, fresh)))  # type: ignore[misc]
        for context, state in states.items():
            taken = _seconds(lambda state=state: _steps(decoder, state.copy(), new_tokens, rng))  # type: ignore[misc]
            keep(f"decode_at_{context}_tok_s", new_tokens / taken)
            keep(f"decode_at_{context}_share", new_tokens / taken * size / bandwidth)
        bar.advance(task)
    figures = {name: {"median": median(v), "low": min(v), "high": max(v)} for name, v in seen.items()}
    return {
        "scheme": bundle.manifest.recipe.scheme,
        "activations": options.activations,
        "kernels": decoder.kernels,
        "threads": threads,
        "rounds": rounds,
        "new_tokens": new_tokens,
        "decoder_bytes": bundle.manifest.files[DECODER].bytes,
        "bytes_a_token": size,
        "relative_rms_from_numpy": distances,
        "open_ms": open_ms,
        "figures": figures,
    }


def _after(decoder: CpuDecoder, tokens: int, rng: np.random.Generator, bar: Progress) -> DecoderState:
    """Return the state after so many random tokens."""
    state, task = decoder.new_state(), bar.add_task(f"context of {tokens}", total=tokens)
    while state.n_tokens < tokens:
        n = min(1024, tokens - state.n_tokens)
        decoder.prefill(decoder.embed(rng.integers(0, decoder.config.vocab, n).tolist()), state)
        bar.advance(task, n)
    return state


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _read(words: np.ndarray, threads: int) -> None:
    from ..decode import _cpu

    if _cpu.kernels.read_once(words, threads) != len(words):
        raise MachineError("the memory gave back other values than were written to it; test this machine's memory")


def _steps(decoder: CpuDecoder, state: DecoderState, count: int, rng: np.random.Generator) -> None:
    for token in rng.integers(0, decoder.config.vocab, count).tolist():
        decoder.step(token, state)
