"""The result of `bench decode` on a CPU or a GPU, and its tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from ..terminal.output import figure, megabytes
from .machine import Machine
from .spread import Spread
from .tables import NOT_MEASURED, Table

Ratios = dict[str, dict[str, Spread]]  # runner, measure, how many times as fast


class Limits(msgspec.Struct, frozen=True):
    """The limits of the machine, measured in the same run: GB/s read, and peak multiply-accumulates per second by kernel."""

    read_gb_s: Spread
    peak_macs_per_s: dict[str, Spread]


class PrefixReuse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Time to first token of a second question, from the saved state of the image and from scratch.

    Attributes:
        visual_tokens, question_tokens: lengths of the two parts of the prompt.
        rounds: how often each was timed.
        state_file_bytes: size of the state on disk; 0 if it is kept in memory.
        part: what is timed.
        scratch_seconds: image and question are read.
        reuse_seconds: the state is restored and the question is read.
        speedup: the ratio of the two within a round.
        activations: of the native decoder.
    """

    visual_tokens: int
    question_tokens: int
    rounds: int
    state_file_bytes: int
    part: str
    scratch_seconds: Spread
    reuse_seconds: Spread
    speedup: Spread
    activations: str | None = None


class Startup(msgspec.Struct, frozen=True, kw_only=True):
    """Time to open a bundle and peak resident memory of a process that decodes with it.

    Attributes:
        activations: of the native decoder.
        prompt_tokens: length of the prompt it reads.
        first_open_seconds: every file is hashed.
        open_seconds: the hashes are cached.
        peak_bytes: resident memory, mapped files included.
        limit_bytes: of this memory.
    """

    activations: str
    prompt_tokens: int
    first_open_seconds: float
    open_seconds: float
    peak_bytes: int
    limit_bytes: int


class RunnerFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a runner is configured; what does not apply to it is None.

    Attributes:
        kernels: instruction set of the native decoder.
        activations: data type of the inputs of the matmuls.
        threads: on a CPU.
        file_type: of a GGUF.
        version: of another runtime.
        built_for: instruction sets that llama.cpp was built for, in its own words.
        backend: of our decoder on a GPU.
        described: kernels that were chosen, or how a peer is set up.
        contexts_without_memory: context lengths that do not fit the memory of the GPU.
    """

    kernels: str | None = None
    activations: str | None = None
    threads: int | None = None
    file_type: str | None = None
    version: str | None = None
    built_for: str | None = None
    backend: str | None = None
    described: str | None = None
    contexts_without_memory: tuple[int, ...] = ()


class RunnerResult(RunnerFacts, frozen=True, kw_only=True, omit_defaults=True):
    """One runner.

    Attributes:
        name: unique within a row.
        weights_bytes: of the weights read per token.
        figures: measurements by name, such as "decode_at_64_tok_s".
        peak_bytes: peak GPU memory; None where it is not counted.
        scheme: of our decoders on a GPU.
        reference: the decoder that those were compared with.
        relative_rms_from_reference: distance of the logits by way of reading the tokens, "together" or "one by one".
        launches_per_token: kernels per token inside the CUDA graph.
        prefix_reuse: of our decoders on a GPU.
    """

    name: str
    weights_bytes: int
    figures: dict[str, Spread]
    peak_bytes: int | None = None
    scheme: str | None = None
    reference: str | None = None
    relative_rms_from_reference: dict[str, float] = {}
    launches_per_token: int | None = None
    prefix_reuse: PrefixReuse | None = None


class DecodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """Runners that were timed in alternation, and the limits measured in the same rounds."""

    batch: int
    rounds: int
    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    limits: Limits
    runners: tuple[RunnerResult, ...]


class CpuDecodeRow(DecodeRow, frozen=True, kw_only=True):
    """One scheme on a CPU; ratios are those to the peer, if there is one."""

    scheme: str
    threads: int
    decoder_bytes: int
    relative_rms_from_numpy: dict[str, float]
    peer: str | None
    ratios: Ratios
    startup: Startup
    prefix_reuse: PrefixReuse


class GpuDecodeRow(DecodeRow, frozen=True, kw_only=True):
    """All schemes and peers on a GPU; ratios by the runner that ours are compared with."""

    state_bytes: int
    ratios: dict[str, Ratios]


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The GPU and the versions of what ran on it."""

    name: str
    driver: str
    bindings: str
    torch: str
    compute_capability: str | None = None
    memory_gb: float | None = None
    multiprocessors: int | None = None


class DecodeResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the results of both devices share."""

    bench: str = "decode"
    model: str
    weights: str
    device: str
    machine: Machine


class CpuDecodeResult(DecodeResult, frozen=True, kw_only=True):
    """`bench decode` on a CPU, one row per scheme."""

    rows: tuple[CpuDecodeRow, ...]


class GpuDecodeResult(DecodeResult, frozen=True, kw_only=True):
    """`bench decode` on a GPU; there is one row."""

    gpu: GpuFacts
    rows: tuple[GpuDecodeRow, ...]


def cpu_tables(result: CpuDecodeResult) -> Iterator[Table]:
    """Yield two tables per scheme: speed, then limits, startup and prefix reuse."""
    for row in result.rows:
        yield _cpu_speed(result.model, row)
        yield _cpu_details(row)


def gpu_tables(result: GpuDecodeResult) -> Iterator[Table]:
    """Yield speed by runner, ratios between runners, then limits, memory and prefix reuse."""
    for row in result.rows:
        title = f"{result.model} on {result.gpu.name}, median (low–high) of {row.rounds} rounds"
        names = _measures(row.runners)
        cells = [[gpu_label(n), *(_optional(n, r.figures.get(n)) for r in row.runners)] for n in names]
        yield Table(["measure", *(r.name for r in row.runners)], cells, title)
        yield _gpu_ratios(row)
        yield _gpu_details(result.gpu.name, row)


def figure_label(name: str) -> str:
    """Return the label of a figure: "decode at 64, tok/s" for "decode_at_64_tok_s"."""
    for ending, unit in (
        ("_tok_s", ", tok/s"),
        ("_macs_per_s", ", 10⁹ MAC/s"),
        ("_peak_share", ", share of peak MAC/s"),
        ("_share", ", share of the bandwidth bound"),
    ):
        if name.endswith(ending):
            return name.removesuffix(ending).replace("_", " ") + unit
    return name.replace("_", " ")


def gpu_label(name: str) -> str:
    """Return the label of a figure on a GPU, whose peak is that of float16 matmuls."""
    return figure_label(name).replace("peak MAC/s", "peak float16 MAC/s")


def figure_cell(name: str, value: Spread) -> str:
    """Write a measurement as median and extremes: shares as percentages, MACs in 10⁹."""
    if name.endswith("_share"):
        return value.cell(".1%")
    value = value.scaled(1e-9 if name.endswith("_macs_per_s") else 1)
    return f"{figure(value.median)} ({figure(value.low)}–{figure(value.high)})"


def _optional(name: str, value: Spread | None) -> str:
    return "" if value is None else figure_cell(name, value)


def _measures(runners: Sequence[RunnerResult]) -> list[str]:
    return list(dict.fromkeys(name for runner in runners for name in runner.figures))


def _cpu_speed(model: str, row: CpuDecodeRow) -> Table:
    title = f"{model} as {row.scheme}, {row.threads} threads, median (low–high) of {row.rounds} rounds"
    columns = ["measure", *(f"{r.name}\n{r.kernels}" if r.kernels else r.name for r in row.runners)]
    columns += [f"{name}\n/ {row.peer}" for name in row.ratios]
    cells = []
    for name in _measures(row.runners):
        measured = [_optional(name, r.figures.get(name)) for r in row.runners]
        cells.append([figure_label(name), *measured, *(_optional("", of.get(name)) for of in row.ratios.values())])
    return Table(columns, cells, title)


def _cpu_details(row: CpuDecodeRow) -> Table:
    limits, startup = row.limits, row.startup
    cells = [
        ["memory bandwidth, read, GB/s", figure_cell("", limits.read_gb_s)],
        *([f"peak int8 MAC/s, {k}, 10⁹/s", figure_cell("_macs_per_s", v)] for k, v in limits.peak_macs_per_s.items()),
        *([f"relative RMS from numpy, {form}", figure(d)] for form, d in row.relative_rms_from_numpy.items()),
        ["first opening, every file hashed, s", figure(startup.first_open_seconds)],
        ["opening with cached hashes, s", figure(startup.open_seconds)],
        ["peak resident memory", megabytes(startup.peak_bytes)],
        ["its limit", megabytes(startup.limit_bytes)],
        *_prefix_rows("", row.prefix_reuse),
        ["speedup, decoder alone", figure_cell("", row.prefix_reuse.speedup)],
    ]
    return Table(["measure", "value"], cells, f"{row.scheme}: limits, startup, prefix reuse")


def _prefix_rows(prefix: str, reuse: PrefixReuse) -> Iterator[list[str]]:
    lengths = f"{reuse.visual_tokens} + {reuse.question_tokens} tokens"
    yield [f"{prefix}first token from scratch, {lengths}, s", figure_cell("", reuse.scratch_seconds)]
    yield [f"{prefix}first token from the image's state, s", figure_cell("", reuse.reuse_seconds)]


def _gpu_ratios(row: GpuDecodeRow) -> Table:
    cells = [
        [name, other, gpu_label(measure).removesuffix(", tok/s"), figure_cell("", value)]
        for other, ours in row.ratios.items()
        for name, figures in ours.items()
        for measure, value in figures.items()
    ]
    return Table(["runner", "compared with", "measure", "speedup"], cells, "speedup within a round")


def _gpu_details(gpu: str, row: GpuDecodeRow) -> Table:
    cells = [["memory bandwidth, GB/s", figure_cell("", row.limits.read_gb_s)]]
    for what, peak in row.limits.peak_macs_per_s.items():
        cells.append([f"large {what} matmul, 10⁹ MAC/s", figure_cell("_macs_per_s", peak)])
    for r in row.runners:
        cells.append([f"{r.name}: weights read per token", megabytes(r.weights_bytes)])
        cells.append([f"{r.name}: peak GPU memory", NOT_MEASURED if r.peak_bytes is None else megabytes(r.peak_bytes)])
        for way, distance in r.relative_rms_from_reference.items():
            cells.append([f"{r.name}: relative RMS from {r.reference}, tokens {way}", figure(distance)])
        cells += [[f"{r.name}: at {n}", "skipped: its KV cache does not fit the GPU"] for n in r.contexts_without_memory]
        if r.prefix_reuse is not None:
            cells += _prefix_rows(f"{r.name}: ", r.prefix_reuse)
    return Table(["measure", "value"], cells, f"{gpu}: limits, memory, prefix reuse")
