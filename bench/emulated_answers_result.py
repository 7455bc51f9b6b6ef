"""The result of `python -m bench.emulated_answers`, and its table."""

from __future__ import annotations

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.tables import Table


class EmulatedAnswers(msgspec.Struct, frozen=True):
    """Answers of one build on the emulated GPU, compared with those of the native decoder.

    Attributes:
        build: its label, see `bench.builds`.
        lines: of the held-out suite, that were asked.
        same_answers: lines whose whole greedy answer has the same tokens.
        tokens: of the native decoder's answers, end tokens included.
        same_tokens: of these, how many are the emulated GPU's likeliest too.
        kld_mean, kld_max: of the tokens' distributions, in nats.
    """

    build: str
    lines: int
    same_answers: int
    tokens: int
    same_tokens: int
    kld_mean: float
    kld_max: float


class EmulatedAnswersResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.emulated_answers`: of cobra-mini."""

    bench: str = "emulated-answers"
    model: str = "cobra-mini"
    suite_lines: int
    rows: tuple[EmulatedAnswers, ...]
    machine: Machine


def emulated_answers_table(result: EmulatedAnswersResult) -> Table:
    """Return agreement by build."""
    columns = ["build", "held-out lines", "answers token for token", "tokens", "the same", "mean KLD (nats)", "max KLD"]
    rows = [
        [
            row.build,
            f"{row.lines} of {result.suite_lines}",
            f"{row.same_answers} ({row.same_answers / row.lines:.1%})",
            f"{row.tokens:,}",
            f"{row.same_tokens:,}",
            f"{row.kld_mean:.1e}",
            f"{row.kld_max:.1e}",
        ]
        for row in result.rows
    ]
    return Table(columns, rows)
