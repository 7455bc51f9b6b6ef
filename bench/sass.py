"""What compiled kernels are made of: registers, spills, and the instructions of the loop that a kernel spends its time in.

Speed on paper needs no GPU: a multiprocessor issues at most four warp instructions a cycle, so instructions for a byte of
weights, times the bytes, are a bound beside the memory's bandwidth. NVIDIA's disassembler comes as a package,
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cobra_edge.decode.cuda.library import Image
from cobra_edge.decode.cuda.tiles import TILES
from cobra_edge.errors import MachineError

_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
_SIZED, _REGISTER_COUNT = 4, 0x2F  # of .nv.info
TOKENS_A_TURN = 4  # of the loops of scan.cu and conv_rows.cu


@dataclass(frozen=True)
class Kernel:
    """A kernel as an architecture runs it.

    Attributes:
        name: its name.
        instructions: in order, predicates taken off.
        loops: (first, last) instruction of each loop, an inner one before those around it.
        registers: of a thread.
    """

    name: str
    instructions: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]
    registers: int

    @property
    def spills(self) -> int:
        """Instructions that move registers to local memory and back."""
        return sum(i.split(".")[0].split()[0] in ("STL", "LDL") for i in self.instructions)

    def main_loop(self, wanted: str) -> tuple[str, ...]:
        """Return the instructions of the shortest loop with one that begins with `wanted`; none where there is no such loop."""
        bodies = [self.instructions[first : last + 1] for first, last in self.loops]
        fitting = [body for body in bodies if any(i.startswith(wanted) for i in body)]
        return min(fitting, key=len, default=())


@dataclass(frozen=True)
class Cost:
    """What a kernel's main loop takes for each unit of work.

    Attributes:
        instructions: a thread issues for a unit.
        unit: "byte of codes" or "token and channel".
        tensor: of the instructions, those of tensor cores.
        special: of the instructions, those of the unit for exponentials.
    """

    instructions: float
    unit: str
    tensor: float
    special: float


def nvdisasm() -> Path:
    """Return NVIDIA's disassembler. Raises MachineError where its package is not installed."""
    for module in ("nvidia.cu13", "nvidia.cuda_nvdisasm"):
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(place) / "bin" / "nvdisasm").is_file():
                return Path(place) / "bin" / "nvdisasm"
    raise MachineError(
        "kernels cannot be disassembled: nvidia-cuda-nvdisasm is not installed; pip install nvidia-cuda-nvdisasm"
    )


def kernels_of(image: Image) -> dict[str, Kernel]:
    """Disassemble a cubin. Raises MachineError where that fails."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image.data)
        file.flush()
        done = subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise MachineError(f"nvdisasm failed on {image}: {done.stderr.strip()[:400]}")
    registers = _registers(image.data)
    found = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        name = part.partition(",")[0].strip().strip('"')
        found[name] = _kernel(name, part, registers[name])
    return found


def _kernel(name: str, text: str, registers: int) -> Kernel:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        if found := _INSTRUCTION.search(line):
            if branch := _BRANCH.search(found[1]):
                branches.append((len(instructions), branch[1]))
            instructions.append(_PREDICATE.sub("", found[1]))
    loops = [(labels[to], at) for at, to in branches if labels.get(to, at + 1) < at]
    return Kernel(name, tuple(instructions), tuple(sorted(loops, key=lambda ends: ends[1] - ends[0])), registers)


def _registers(cubin: bytes) -> dict[str, int]:
    """Return the registers of each kernel, from the attributes that ptxas writes beside the code.

    Section .nv.info is a list of attributes: a format, a kind, and two bytes that are the size of what follows where the
    format is 4.
    """
    offset = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]

    def text(table: int, at: int) -> str:
        begin = sections[table][4] + at
        return cubin[begin : cubin.index(b"\0", begin)].decode()

    by_name = {text(names_at, section[0]): section for section in sections}
    symbols, info = by_name[".symtab"], by_name[".nv.info"]
    found, at = {}, info[4]
    while at < info[4] + info[5]:
        form, kind, length = struct.unpack_from("<BBH", cubin, at)
        if (form, kind) == (_SIZED, _REGISTER_COUNT):
            symbol, registers = struct.unpack_from("<II", cubin, at + 4)
            found[text(symbols[6], struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)[0])] = registers
        at += 4 + (length if form == _SIZED else 0)
    return found


def opcode(instruction: str) -> str:
    """Return an instruction's name without its modifiers."""
    return instruction.split()[0].split(".")[0]


def cost(kernel: Kernel) -> Cost | None:
    """Return what a kernel's main loop takes; None of kernels whose time is of no account, or whose work is not counted so."""
    kind, _, rest = kernel.name.partition("_")
    if kind == "gemv":
        body = kernel.main_loop("LDG.E.EF")
        units, unit = float(sum(_width(i) for i in body if i.startswith("LDG.E.EF"))), "byte of codes"
    elif kind == "gemm":
        bits, size = rest.split("_")
        tile = next(t for t in TILES[int(bits[1:])] if t.name == size)
        inputs = 64 if bits == "w16" else 128
        body, unit = kernel.main_loop("HMMA"), "byte of codes"
        units = tile.rows * inputs * int(bits[1:]) / 8 / tile.threads
    elif kernel.name in ("scan_rows", "scan_chunks", "conv_rows_4", "conv_rows_8"):
        # Whoever gates divides; the loop that carries a state over the chunks before does not.
        body = kernel.main_loop("MUFU.EX2" if kernel.name == "scan_chunks" else "MUFU.RCP")
        units, unit = float(TOKENS_A_TURN), "token and channel"
    else:
        return None
    if not body or not units:
        raise MachineError(f"the main loop of {kernel.name} is not found among its instructions")
    counts = Counter(opcode(i) for i in body)
    return Cost(len(body) / units, unit, counts["HMMA"] / units, counts["MUFU"] / units)


def _width(load: str) -> int:
    """Return the bytes that a load moves for a thread."""
    return next((width for mark, width in _WIDTHS.items() if mark in load.split()[0]), 4)
