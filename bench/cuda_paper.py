"""`python -m bench.cuda_paper`: what the CUDA decoder should reach on paper, from its compiled kernels; nothing is measured.

A token is bound by the slower of two: the bytes it moves, over a share of the data sheet's bandwidth, and the warp
instructions of the products' main loops (runtimes/cuda/budget.toml), over what all schedulers issue at the data sheet's
clock. The launches of its graph are added. A prompt is bound by tensor cores, by instructions or by bytes, product by
product, and by exponentials in the scan; its launches are added too. The host enqueues them ahead of the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import click
import msgspec

from cobra_edge.bench.results import RESULTS, save_result
from cobra_edge.bench.roofline import launches_per_token, token_bytes
from cobra_edge.decode.cuda.tiles import TILES, gemm_launch, scan_launch
from cobra_edge.formats.model_config import CobraConfig, MambaConfig
from cobra_edge.formats.recipe import Recipe, quantized_scheme, stored_tensors, uniform_recipe
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.terminal.option_groups import Command
from cobra_edge.terminal.output import debug_option, main_of, say

from .kernel_budget import Used, read_budget
from .speed_model import LAUNCH_US, shape_config

RESULT = RESULTS / "cuda-paper.json"
SCHEMES = ("w4a16-g128", "w8a16-g128", "w3a16-g64")
SHAPE, PROMPT = "cobra-3b", 768  # an image and a short question
_LANES, _SCHEDULERS = 32, 4
_CODES_SUFFIX, _SCALES_SUFFIX = ".codes", ".scales"
# Shares of the data sheet's bandwidth: of whole tokens by published kernels on an Orin Nano, and of llama.cpp's mmvq, a
# kernel by itself, on an RTX 3090.
BANDWIDTH_SHARES = (0.81, 0.94)
# Shares of the tighter bound that a product of many tokens reaches; an assumption.
PROMPT_SHARES = (0.6, 0.85)
_EXPONENTIALS_A_CYCLE = 16  # of a multiprocessor


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Attributes:
        name: its title.
        family: "jetson", "rtx" or "hopper", by which the time between launches is assumed.
        multiprocessors: of four schedulers each.
        clock_ghz: at which they issue; of a Jetson in the power mode named.
        bandwidth_gb_s: of its memory.
        accumulates: products of float16 added in float32 that a multiprocessor's tensor cores do in a cycle, by mma.sync.
    """

    name: str
    family: str
    multiprocessors: int
    clock_ghz: float
    bandwidth_gb_s: float
    accumulates: int

    @property
    def issued_per_second(self) -> float:
        """Warp instructions of all schedulers."""
        return self.multiprocessors * _SCHEDULERS * self.clock_ghz * 1e9


# Sources: NVIDIA's data sheets of the Jetson Orin series and of the H200, and the architecture white papers of Ampere GA102,
# Ada and Blackwell. On a GeForce tensor cores that add in float32 run at half their rate. An H200's are made for instructions
# that copy for themselves; mma.sync is reported to reach some 62 % of their rate.
DEVICES = (
    Device("Jetson Orin Nano 8GB, 15 W", "jetson", 8, 0.625, 68.0, 1024),
    Device("Jetson Orin Nano 8GB, Super mode", "jetson", 8, 1.02, 102.0, 1024),
    Device("Jetson Orin NX 16GB", "jetson", 8, 0.918, 102.4, 1024),
    Device("Jetson AGX Orin 64GB", "jetson", 16, 1.3, 204.8, 1024),
    Device("GeForce RTX 3060 12GB", "rtx", 28, 1.777, 360.0, 256),
    Device("GeForce RTX 4060 8GB", "rtx", 24, 2.46, 272.0, 256),
    Device("GeForce RTX 4090 24GB", "rtx", 128, 2.52, 1008.0, 256),
    Device("GeForce RTX 5090 32GB", "rtx", 170, 2.407, 1792.0, 256),
    Device("H200 141GB", "hopper", 132, 1.98, 4800.0, 1270),
)
GAPS_US = {**LAUNCH_US, "hopper": 1.3}  # 1.3 µs a kernel in a graph was published for an H100


@dataclass(frozen=True)
class Anchor:
    """What others published, of other models and runtimes on the same devices."""

    device: str
    what: str
    tokens_per_second: float


ANCHORS = (
    Anchor("Jetson Orin Nano 8GB", "Mamba1-2.8B, W8A8, Quamba", 1e3 / 60.2),
    Anchor("Jetson Orin Nano 8GB", "Cosmos-Reason2-2B, 4 bits, TensorRT-Edge-LLM, power mode not stated", 60),
    Anchor("Jetson Orin Nano 8GB", "the same by vLLM", 56),
    Anchor("Jetson Orin Nano 8GB", "the same by llama.cpp", 38),
    Anchor("Jetson Orin Nano 8GB, Super mode", "Llama-3.2-3B, 4 bits, MLC", 43),
    Anchor("Jetson AGX Orin 64GB", "Qwen2.5-VL-3B, W4A16, TensorRT-Edge-LLM", 72),
    Anchor("GeForce RTX 4090 24GB", "a 7B model, 4 bits, MLC", 191),
)


@dataclass(frozen=True)
class Token:
    """One token of a scheme, whatever the GPU.

    Attributes:
        scheme: of every matrix.
        moved_bytes: weights once, and the state twice.
        warp_instructions: of the products' main loops.
        launches: of its graph, the greedy choice among them.
    """

    scheme: str
    moved_bytes: int
    warp_instructions: float
    launches: int


@dataclass(frozen=True)
class OnPaper:
    """A prediction for a GPU: the bounds in milliseconds, and the rates that follow.

    Attributes:
        device, scheme: of what.
        memory_ms, issue_ms: a token's bytes at the whole bandwidth, its instructions.
        launches_ms: between the kernels of a token.
        tokens_per_second: from low to high.
        prompt_launches: kernels of `PROMPT` tokens.
        prompt_ms: of `PROMPT` tokens, from low to high.
        bound: "memory" or "issue", of a token.
        prompt_bound: "tensor cores", "issue" or "memory", of most of a prompt's time.
    """

    device: str
    scheme: str
    memory_ms: float
    issue_ms: float
    launches_ms: float
    tokens_per_second: tuple[float, float]
    prompt_launches: int
    prompt_ms: tuple[float, float]
    bound: str
    prompt_bound: str


class CudaPaperResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.cuda_paper`: cost per token, predictions, and what others published. Nothing in it is measured."""

    bench: str = "cuda-paper"
    measured: bool = False
    shape: str
    prompt_tokens: int
    bandwidth_shares: tuple[float, float]
    prompt_shares: tuple[float, float]
    gaps_us: dict[str, float]
    kernels: dict[str, Used]
    tokens: tuple[Token, ...]
    devices: tuple[Device, ...]
    predicted: tuple[OnPaper, ...]
    published: tuple[Anchor, ...]


def _matrices(config: MambaConfig, recipe: Recipe) -> Iterator[tuple[str, int, int, int, int]]:
    """Yield name, bits, outputs, inputs and bytes of weights of each matrix that a token is multiplied with, the head too."""
    head = "backbone.embedding.weight" if config.tied else "lm_head.weight"
    for name, entries in stored_tensors(config, recipe).items():
        if not (name == head or (name.endswith("_proj.weight"))):
            continue
        scheme = quantized_scheme(recipe, name)
        stored = next(e for e in entries if scheme is None or e.name.endswith(_CODES_SUFFIX))
        bits = 16 if scheme is None else scheme.weight_bits
        n_in = stored.shape[1] if scheme is None else stored.shape[1] * 8 // bits
        yield name, bits, stored.shape[0], n_in, stored.n_bytes


def token_of(scheme: str, config: CobraConfig, budget: dict[str, Used]) -> Token:
    """Count a token. dt_proj is part of the state's step and is counted as a product of its bytes."""
    recipe, _ = uniform_recipe(config.mamba, scheme_named(scheme))
    issued = 0.0
    for _, bits, _, _, n_bytes in _matrices(config.mamba, recipe):
        a_byte = budget[f"gemv_w{bits}"].instructions
        assert a_byte is not None
        issued += n_bytes * a_byte / _LANES
    return Token(scheme, token_bytes(config, recipe), issued, launches_per_token(config.mamba, recipe))


def prompt_launches(config: MambaConfig, recipe: Recipe, tokens: int, multiprocessors: int) -> int:
    """Return the kernels that read a prompt on a GPU, and those of the logits after it; embeddings are there already."""
    scan = scan_launch(config.d_inner, config.d_state, tokens, multiprocessors)
    # Norm, convolution, the sum of x_proj's parts, and the scan in one pass or two.
    n = config.n_layer * (4 + (scan.chunks > 1) + recipe.rotates_out_proj)
    for name, bits, n_out, n_in, _ in _matrices(config, recipe):
        summed = ".in_proj." in name or ".out_proj." in name
        if ".layers." in name:
            n += 1 + (summed and gemm_launch(bits, n_out, n_in, tokens, multiprocessors).splits > 1)
    return n + 1 + 2 * recipe.rotates_residual


def _prompt(device: Device, scheme: str, config: MambaConfig, budget: dict[str, Used]) -> tuple[float, str]:
    """Return the seconds that a prompt is bound by, and what bounds most of them."""
    recipe, _ = uniform_recipe(config, scheme_named(scheme))
    by_bound = {"tensor cores": 0.0, "issue": 0.0, "memory": 0.0}
    for name, bits, n_out, n_in, n_bytes in _matrices(config, recipe):
        if ".layers." not in name:
            continue  # the head sees one token
        bits = 16 if ".dt_proj." in name else bits
        launch = gemm_launch(bits, n_out, n_in, PROMPT, device.multiprocessors)
        columns, rows, splits = launch.grid
        stages = -(-launch.inputs_a_split // (64 if bits == 16 else 128))
        a_byte = budget[launch.kernel].instructions
        assert a_byte is not None
        stage_bytes = launch.tile.rows * (64 if bits == 16 else 128) * bits / 8
        blocks = columns * rows * splits
        whole = -(-blocks // device.multiprocessors) * device.multiprocessors if launch.tile is TILES[bits][2] else blocks
        macs = whole * launch.tile.rows * launch.tile.tokens * stages * (64 if bits == 16 else 128)
        times = {
            "tensor cores": macs / (device.accumulates * device.multiprocessors * device.clock_ghz * 1e9),
            "issue": whole * stages * stage_bytes * a_byte / _LANES / device.issued_per_second,
            "memory": n_bytes / (device.bandwidth_gb_s * 1e9),
        }
        bound = max(times, key=lambda k: times[k])
        by_bound[bound] += times[bound]
    scan = scan_launch(config.d_inner, config.d_state, PROMPT, device.multiprocessors)
    passes = {"scan_rows": 1.0, "scan_chunks": (scan.chunks - 1) / scan.chunks}
    issued = sum((budget[k].instructions or 0) * share for k, share in passes.items())
    exponentials = sum(config.d_state * share for share in passes.values()) / _EXPONENTIALS_A_CYCLE
    cycles = max(issued / _LANES / _SCHEDULERS, exponentials)
    by_bound["issue"] += config.n_layer * PROMPT * config.d_inner * cycles / device.multiprocessors / device.clock_ghz / 1e9
    return sum(by_bound.values()), max(by_bound, key=lambda k: by_bound[k])


def on_paper(device: Device, token: Token, config: CobraConfig, budget: dict[str, Used]) -> OnPaper:
    """Predict a token and a prompt."""
    memory = token.moved_bytes / device.bandwidth_gb_s / 1e6
    issue = token.warp_instructions / device.issued_per_second * 1e3
    launches = token.launches * GAPS_US[device.family] / 1e3
    low, high = (1e3 / (max(memory / share, issue) + launches) for share in BANDWIDTH_SHARES)
    seconds, prompt_bound = _prompt(device, token.scheme, config.mamba, budget)
    recipe, _ = uniform_recipe(config.mamba, scheme_named(token.scheme))
    n = prompt_launches(config.mamba, recipe, PROMPT, device.multiprocessors)
    slow, fast = (seconds * 1e3 / share + n * GAPS_US[device.family] / 1e3 for share in PROMPT_SHARES)
    bound = "memory" if memory / BANDWIDTH_SHARES[1] >= issue else "issue"
    return OnPaper(device.name, token.scheme, memory, issue, launches, (low, high), n, (fast, slow), bound, prompt_bound)


def paper(budget: dict[str, Used], schemes: Iterable[str] = SCHEMES) -> CudaPaperResult:
    """Return the whole result, its numbers rounded to six digits."""
    config = shape_config(SHAPE)
    tokens = tuple(token_of(scheme, config, budget) for scheme in schemes)
    found = CudaPaperResult(
        shape=SHAPE,
        prompt_tokens=PROMPT,
        bandwidth_shares=BANDWIDTH_SHARES,
        prompt_shares=PROMPT_SHARES,
        gaps_us=GAPS_US,
        kernels={name: used for name, used in budget.items() if used.instructions is not None},
        tokens=tokens,
        devices=DEVICES,
        predicted=tuple(on_paper(device, token, config, budget) for device in DEVICES for token in tokens),
        published=ANCHORS,
    )
    rounded = json.loads(msgspec.json.encode(found), parse_float=lambda text: float(f"{float(text):.6g}"))
    return msgspec.convert(rounded, CudaPaperResult)


@click.command(cls=Command, epilog="Example: python -m bench.cuda_paper")
@debug_option
def cuda_paper() -> None:
    """Predict the speed of the CUDA decoder from runtimes/cuda/budget.toml; `bench figures` fills the tables."""
    say(f"wrote {save_result(RESULT.stem, paper(read_budget()))}")


main = main_of(cuda_paper)

if __name__ == "__main__":
    main()
