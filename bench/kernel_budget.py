"""`python -m bench.kernel_budget`: registers and instructions of the compiled CUDA kernels, and runtimes/cuda/budget.toml.

A kernel that becomes slower on paper fails a test (tests/laboratory/test_kernel_budget.py). A change that is meant to cost more
writes the budget again, in a commit that says what the instructions are for.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import msgspec
from filelock import FileLock

from cobra_edge.bench.tables import Table, terminal_table
from cobra_edge.decode.cuda.library import KernelLibrary, kernels_file, read_kernels
from cobra_edge.errors import InputError, MachineError
from cobra_edge.files.parsing import ParseError, parse_toml
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, results, say

from .sass import Cost, Kernel, cost, kernels_of

ROOT = Path(__file__).parent.parent
BUDGET = ROOT / "runtimes" / "cuda" / "budget.toml"
_HEAD = """\
# What a kernel may take of a GPU, the worst of all architectures it is compiled for: registers of a thread, and instructions
# that a thread of its main loop needs for a byte of codes (gemv, gemm) or for a token and channel (scan, convolution). None may
# spill. Written by `python -m bench.kernel_budget --write`; tests/laboratory/test_kernel_budget.py holds the kernels to it.
"""


@dataclass(frozen=True)
class Used:
    """What a kernel takes.

    Attributes:
        registers: of a thread.
        instructions: of its main loop for a unit of work; None where nobody counts.
    """

    registers: int
    instructions: float | None = None

    def exceeds(self, budget: Used) -> str | None:
        """Say by what a budget is exceeded, or None. A hundredth of an instruction is rounding."""
        if self.registers > budget.registers:
            return f"{self.registers} registers, the budget is {budget.registers}"
        if (self.instructions or 0) > (budget.instructions or 0) + 0.01:
            return f"{self.instructions:.2f} instructions for a unit of work, the budget is {budget.instructions or 0:.2f}"
        return None


def compiler() -> ModuleType:
    """Return runtimes/cuda/compile.py, which belongs to the build and to no package."""
    name = "cobra_compile_kernels"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "runtimes" / "cuda" / "compile.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def current_kernels() -> KernelLibrary:
    """Return the kernels of this source tree: the installation's, if they were made of these sources, or compiled now and kept.

    Raises:
        MachineError: they have to be compiled, and cannot be.
    """
    made = compiler()
    source = made.sources_hash()
    installed = kernels_file()
    if installed is not None and (found := read_kernels(installed)).sources == source:
        return found
    kept = ROOT / "build" / f"kernels-{source[:16]}.xz"
    kept.parent.mkdir(exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.is_file():
            try:
                data = made.packed(made.compile_all(), source)
            except made.CompileError as error:
                raise MachineError(str(error)) from error
            kept.write_bytes(data)
        return read_kernels(kept)


def disassembled(library: KernelLibrary) -> dict[str, dict[str, Kernel]]:
    """Return all kernels by architecture and name. Raises MachineError where there is no disassembler."""
    return {str(image): kernels_of(image) for image in library.images if image.kind == "cubin"}


def used(kernels: Mapping[str, Mapping[str, Kernel]]) -> dict[str, Used]:
    """Return what each kernel takes at worst, by name."""
    found: dict[str, Used] = {}
    for of_architecture in kernels.values():
        for name, kernel in of_architecture.items():
            loop: Cost | None = cost(kernel)
            before = found.get(name, Used(0))
            instructions = before.instructions if loop is None else max(before.instructions or 0, loop.instructions)
            found[name] = Used(max(before.registers, kernel.registers), instructions)
    return dict(sorted(found.items()))


def read_budget(file: Path = BUDGET) -> dict[str, Used]:
    """Return the budget of each kernel, by name. Raises InputError where the file is not one."""
    try:
        return msgspec.convert(parse_toml(file.read_bytes()), dict[str, Used])
    except (OSError, ParseError, msgspec.ValidationError) as error:
        raise InputError(f"{file} is no budget of kernels: {error}") from error


def written(found: Mapping[str, Used]) -> str:
    """Return the text of a budget that is just kept."""
    parts = [_HEAD]
    for name, row in found.items():
        parts.append(f"\n[{name}]\nregisters = {row.registers}\n")
        if row.instructions is not None:
            parts.append(f"instructions = {math.ceil(row.instructions * 100) / 100:.2f}\n")
    return "".join(parts)


@click.command(cls=Command, epilog="Example: python -m bench.kernel_budget --write")
@option("--write", group="output", is_flag=True, help="Write runtimes/cuda/budget.toml from what was found.")
@debug_option
def kernel_budget(write: bool) -> None:
    """Count registers and instructions of the compiled kernels; exit with 2 where one exceeds its budget."""
    found = used(disassembled(current_kernels()))
    if write:
        BUDGET.write_text(written(found), encoding="utf-8")
        say(f"wrote {BUDGET}")
        return
    budget = read_budget()
    rows, over = [], []
    for name, row in found.items():
        why = row.exceeds(budget[name]) if name in budget else "no budget"
        over += [name] if why else []
        counted = "" if row.instructions is None else f"{row.instructions:.2f}"
        rows.append([name, str(row.registers), counted, why or "within"])
    title = "CUDA kernels, the worst of all architectures"
    results.print(terminal_table(Table(["kernel", "registers", "instructions per unit", ""], rows, title)))
    if over:
        raise InputError(f"over budget: {', '.join(over)}; see {BUDGET}")


main = main_of(kernel_budget)

if __name__ == "__main__":
    main()
