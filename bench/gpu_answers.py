"""cobra-mini's greedy answers by the CUDA decoder and by the native one, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cobra_edge.bundle.reader import Bundle
from cobra_edge.errors import MachineError
from cobra_edge.formats.package_data import MINI
from cobra_edge.inference.session import Session
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import read_suite
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, say

from .gpu_result import AnswerParity

_HELD_OUT = MINI / "heldout.jsonl"
_SHOWN = 5


def compare_answers(directory: Path, lines: int, new_tokens: int) -> AnswerParity:
    """Ask both decoders the first held-out questions.

    Args:
        directory: of a bundle of cobra-mini.
        lines: how many questions.
        new_tokens: of an answer, at most.

    Raises:
        BundleError: the bundle cannot be opened. MachineError: a decoder is missing.
    """
    bundle = Bundle.open(directory)
    gpu, native = Session(bundle, "auto", "cuda"), Session(bundle, "cpu", "native")
    asked = read_suite(_HELD_OUT)[:lines]
    pairs = [tuple(_answers(session, asked, new_tokens)) for session in (gpu, native)]
    different = [line.prompt for line, ours, theirs in zip(asked, *pairs, strict=True) if ours != theirs]
    return AnswerParity(
        scheme=bundle.manifest.recipe.scheme,
        lines=len(asked),
        tokens=sum(map(len, pairs[1])),
        same=len(asked) - len(different),
        different=tuple(different[:_SHOWN]),
    )


def _answers(session: Session, lines: list[Line], new_tokens: int) -> Iterator[list[int]]:
    seen: dict[str | None, Any] = {}
    for line in lines:
        if line.image not in seen:
            seen[line.image] = None if line.image is None else session.look(_HELD_OUT.parent / line.image)
        answer = session.ask(seen[line.image], line.prompt, max_new_tokens=new_tokens)
        answer.read()
        yield list(answer.tokens)


@click.command(cls=Command, epilog="Example: python -m bench.gpu_answers build/gpu/mini-w4a16-g128 --lines 2")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@option("--lines", group="measurement", type=click.IntRange(1), default=8, help="Held-out questions.")
@option("--new-tokens", group="measurement", type=click.IntRange(1), default=16, help="Length of an answer, at most.")
@debug_option
def gpu_answers(bundles: tuple[Path, ...], lines: int, new_tokens: int) -> None:
    """Compare cobra-mini's answers on the GPU with the native decoder's; nothing is saved."""
    for directory in bundles:
        found = compare_answers(directory, lines, new_tokens)
        say(f"{found.scheme}: {found.same} of {found.lines} answers are the native decoder's")
        if found.different:
            raise MachineError(f"answers differ on this GPU, the first to {found.different[0]!r}; run bench.gpu_parity")


main = main_of(gpu_answers)

if __name__ == "__main__":
    main()
