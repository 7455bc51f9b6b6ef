"""`python -m bench.gpu_kernels`: each kernel of a token and of prompts on this machine's GPU, at full size.

Launches are recorded as the decoder makes them. Those that differ in nothing but the layer become one CUDA graph, so that
each reads weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import msgspec
import numpy as np

from cobra_edge.bench.decode_request import BUNDLES, DEFAULT_SHAPE
from cobra_edge.bench.gpu import Gpu, GpuLimits, gpu_here, short_name
from cobra_edge.bench.machine import machine
from cobra_edge.bench.random_bundle import random_bundle
from cobra_edge.bench.results import save_result
from cobra_edge.bench.shapes import shape_named
from cobra_edge.bench.spread import spread
from cobra_edge.bench.tables import print_result
from cobra_edge.bundle.reader import DECODER, Bundle
from cobra_edge.decode.cuda.device import first_gpu
from cobra_edge.decode.cuda.launch import Address, Graph, Launch, Queue
from cobra_edge.decode.cuda.prefill import Prefill
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.decode.cuda.step import Step
from cobra_edge.decode.cuda.weights import GpuMatrix, GpuWeights, upload
from cobra_edge.decode.decoder import Weights
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, progress

from .gpu_facts import gpu_facts
from .gpu_result import GpuKernelsResult, KernelTime, SchemeKernels, kernels_tables

_LAST_OF_A_TOKEN = "choose_likeliest"
_ROUND_SECONDS = 5e-3  # a round repeats a graph until it lasts so long
_MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")


class RecordingQueue(Queue):
    """A stream whose launches are written down."""

    def __init__(self, gpu: Any, stream: Any) -> None:
        """Take a stream of that GPU."""
        super().__init__(gpu, stream)
        self.recorded: list[Launch] = []

    def enqueue(self, launch: Launch) -> None:
        """See `Queue.enqueue`."""
        self.recorded.append(launch)
        super().enqueue(launch)

    def repeat(self, kinds: Sequence[Sequence[Launch]], kind_of: Sequence[int], table: np.ndarray) -> None:
        """See `Queue.repeat`."""
        for row, kind in zip(table, kind_of, strict=True):
            self.recorded += [launch.in_row(row) for launch in kinds[kind]]
        super().repeat(kinds, kind_of, table)

    def replay(self, launches: list[Launch]) -> Graph:
        """Return launches as one graph."""

        def run() -> None:
            for launch in launches:
                Queue.enqueue(self, launch)

        return self.capture(run)


class Recorded:
    """A bundle's decoder whose launches were recorded, by part."""

    def __init__(self, bundle: Bundle, prompts: tuple[int, ...]) -> None:
        """Upload the weights, and run a token and prompts once."""
        gpu, weights = first_gpu(), Weights.of(bundle)
        gpu.enter()
        gpu.load()
        self.queue = RecordingQueue(gpu, gpu.take_stream())
        self.weights = upload(weights, self.queue, bundle.path(DECODER))
        self.state = GpuState.blank(weights.config, self.queue)
        self._step, self._prefill = Step(self.weights, self.queue), Prefill(self.weights, self.queue)
        self._step.prepare(self.state)
        names = [launch.name for launch in self.queue.recorded]
        self.parts = {"token": self.queue.recorded[: names.index(_LAST_OF_A_TOKEN) + 1]}
        for tokens in prompts if self._prefill.why_not is None else ():
            self.queue.recorded = []
            room = self._prefill.room(tokens)
            self._prefill.run_layers(room, tokens, self.state)
            self._step.head(Address(room.residual + 4 * weights.config.d_model * (tokens - 1)))
            self.queue.wait("reading a prompt")
            self.parts[f"prompt of {tokens}"] = self.queue.recorded

    def groups(self, part: str) -> Iterator[tuple[str, list[Launch]]]:
        """Yield launches that differ in nothing but the layer, with the matrix that they multiply with, or ""."""
        roles = {int(matrix.codes): role for role, matrix in _matrices(self.weights)}
        found: dict[tuple[object, ...], list[Launch]] = {}
        for launch in self.parts[part]:
            role = next((roles[a] for a in launch.arguments if isinstance(a, Address) and int(a) in roles), "")
            found.setdefault((role, *_alike(launch)), []).append(launch)
        return ((str(key[0]), launches) for key, launches in found.items())

    def work_of(self, launch: Launch, tokens: int) -> tuple[int, int]:
        """Return the bytes of weights and state that a launch moves, and its multiply-accumulates."""
        c = self.weights.config
        matrix = next((m for _, m in _matrices(self.weights) if m.codes in launch.arguments), None)
        state = {"conv_step": c.d_conv, "selective_state_update": c.d_state, "conv_rows": c.d_conv, "scan_rows": c.d_state}
        moved = sum(2 * 4 * c.d_inner * width for name, width in state.items() if launch.name.startswith(name))
        if matrix is None or launch.name.startswith("embed"):
            return moved, 0
        n_out, n_in = matrix.shape
        scales = 0 if matrix.bits == 16 else 2 * n_out * max(1, n_in >> matrix.group_shift)
        return moved + n_out * n_in * matrix.bits // 8 + scales, n_out * n_in * (1 if "gemv" in launch.name else tokens)


def _alike(launch: Launch) -> tuple[object, ...]:
    """Return what launches have in common that differ in the layer alone."""
    return (launch.name, launch.grid, len(launch.arguments), tuple(type(a) for a in launch.arguments))


def _matrices(weights: GpuWeights) -> Iterator[tuple[str, GpuMatrix]]:
    for layer in weights.layers:
        yield from ((name, getattr(layer, name)) for name in _MATRICES)
    yield "head", weights.head


def _graph_seconds(graph: Graph, gpu: Gpu) -> Callable[[], float]:
    """Return a function that times one replay of a graph, by as many as take a round."""

    def replays(n: int) -> float:
        def run() -> None:
            for _ in range(n):
                graph.launch()

        return gpu.seconds(run) / n

    replays(1)
    n = max(1, min(200, int(_ROUND_SECONDS / max(replays(1), 1e-6))))
    return lambda: replays(n)


def time_kernels(recorded: Recorded, gpu: Gpu, scheme: str, rounds: int) -> SchemeKernels:
    """Time the parts, and the groups of launches that they consist of, in alternation with the bandwidth."""
    limits, queue, reads = GpuLimits(gpu), recorded.queue, []
    works: list[tuple[str, str, list[Launch]]] = [(part, "", launches) for part, launches in recorded.parts.items()]
    n_parts = len(works)
    works += [(part, role, launches) for part in recorded.parts for role, launches in recorded.groups(part)]
    timers = [_graph_seconds(queue.replay(launches), gpu) for _, _, launches in works]
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        reads.append(limits.read_bandwidth())
        for seconds, timer in zip(taken, timers, strict=True):
            seconds.append(timer())
    bandwidth, kernels = spread(reads), []
    for (part, role, launches), seconds in list(zip(works, taken, strict=True))[n_parts:]:
        each = spread(seconds).scaled(1 / len(launches))
        moved, macs = recorded.work_of(launches[0], 1 if part == "token" else int(part.split()[-1]))
        rate = moved / each.median if moved else None
        kernels.append(
            KernelTime(
                part=part, kernel=launches[0].name, role=role, launches=len(launches), microseconds=each.scaled(1e6),
                weight_bytes=moved, macs=macs, gb_s=None if rate is None else rate / 1e9,
                bandwidth_share=None if rate is None else rate / bandwidth.median,
            )
        )  # fmt: skip
    return SchemeKernels(
        scheme=scheme,
        read_gb_s=bandwidth.scaled(1e-9),
        parts_ms={part: spread(s).scaled(1e3) for (part, _, _), s in zip(works[:n_parts], taken, strict=False)},
        kernels=tuple(kernels),
    )


@click.command(cls=Command, epilog="Example: python -m bench.gpu_kernels --scheme w4a16-g128")
@option("--shape", group="input", default=DEFAULT_SHAPE, help="Published shape, with random weights.")
@option("--scheme", "schemes", group="input", multiple=True, default=("w4a16-g128",), help="Scheme; repeatable.")
@option(
    "--prompt-tokens",
    "prompts",
    group="measurement",
    multiple=True,
    type=click.IntRange(1),
    default=(256, 768),
    help="Length of a prompt; repeatable.",
)
@option("--rounds", group="measurement", type=click.IntRange(1), default=5, help="Repetitions of each measurement.")
@debug_option
def gpu_kernels(shape: str, schemes: tuple[str, ...], prompts: tuple[int, ...], rounds: int) -> None:
    """Time every kernel of the CUDA decoder on this machine's GPU, beside the bandwidth measured in the same run."""
    gpu = gpu_here()
    result = GpuKernelsResult(shape=shape, rounds=rounds, gpu=gpu_facts(), machine=machine())
    for scheme in schemes:
        with progress() as bar:
            bundle = random_bundle(shape_named(shape).mamba, scheme, BUNDLES / f"bench-{shape}-{scheme}", bar)
        found = time_kernels(Recorded(bundle, prompts), gpu, scheme, rounds)
        result = msgspec.structs.replace(result, schemes=(*result.schemes, found))
        file = save_result(f"gpu-kernels-{short_name(gpu.name)}", result)
    print_result(kernels_tables(result), file)


main = main_of(gpu_kernels)

if __name__ == "__main__":
    main()
