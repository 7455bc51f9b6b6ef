"""`python -m bench.emulated_answers`: cobra-mini's held-out answers by the CUDA kernels on the emulated GPU.

The kernels' own sources run on the CPU (tests/emulated), under the shipped host code and the real cuda-bindings. Each line is
answered greedily by the native decoder; the emulated GPU reads the same image and prompt as one chunk each, then the same
answer token by token. An answer is the same where every token is the likeliest of both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np

from cobra_edge.bench.machine import machine
from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.decode.decoder import Decoder, DecoderOptions, DecoderState
from cobra_edge.errors import InputError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.session import Session
from cobra_edge.regress.answer_logits import look_at
from cobra_edge.regress.metrics import kl_divergence
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.suite.tokenized import TokenizedLine, TokenizedSuite, with_image_state
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, progress
from cobra_edge.terminal.suggestions import near_matches

from .builds import BUILDS, DEFAULT_ON_GPU, REFERENCE, Build
from .emulated_answers_result import EmulatedAnswers, EmulatedAnswersResult, emulated_answers_table
from .quality_comparison import embedded_suite

NAME = "emulated-answers"
_ALL = DEFAULT_ON_GPU  # is asked every line, the others some
_OTHERS = ("fp16", "w8a16-g128", "w4a16-g128", "w4a16-g128 gptq, rotated", "best, 3.5 bits", "w4a8")
_SOME_LINES = 64
_BETWEEN = 25  # lines between two results that are saved
_LONGEST = 48  # tokens of an answer


@click.command(cls=Command, epilog="Example: python -m bench.emulated_answers --only w4a16-g128 --lines 20 --name try")
@option("--only", group="measurement", multiple=True, metavar="LABEL", help="Answer with this build alone; repeatable.")
@option("--lines", group="measurement", type=click.IntRange(1), help="Lines of each build.  [default: all, and 64 of others]")
@option("--name", group="output", default=NAME, help="Name of the file in bench/results.")
@debug_option
def emulated_answers(only: tuple[str, ...], lines: int | None, name: str) -> None:
    """Compare greedy answers of the emulated GPU with those of the native decoder, token for token; takes minutes."""
    check_name(name)
    builds = {build.label: build for build in (REFERENCE, *BUILDS)}
    for label in only:
        if label not in builds:
            raise InputError(f"unknown build {label!r}{near_matches(label, builds)}")
    plug_in()
    suite, rows = read_suite(HELDOUT), list[EmulatedAnswers]()
    with tempfile.TemporaryDirectory() as folder:
        for label in only or (_ALL, *_OTHERS):
            wanted = lines or (len(suite) if label == _ALL else _SOME_LINES)
            for row in compare(builds[label], Path(folder), wanted):  # a run that is ended keeps what it has
                result = EmulatedAnswersResult(suite_lines=len(suite), rows=(*rows, row), machine=machine())
                file = save_result(name, result)
            rows.append(row)
    print_result([emulated_answers_table(result)], file)


def plug_in() -> None:
    """Have the emulated GPU in this process from now on."""
    from tests.emulated.driver import FakeDriver

    FakeDriver().plug_in()


def compare(build: Build, folder: Path, n_lines: int) -> Iterator[EmulatedAnswers]:
    """Export a build, and answer lines spread over the suite's tasks on both; yield what was found, now and again."""
    out = folder / build.label.replace(",", "").replace(" ", "-")
    exported = export_bundle(
        "mini", target_named(build.target), out, golden_lines=2, budget=budget_without_limits(folder), **build.export
    )
    bundle, floats = Bundle.open(exported.directory), DecoderOptions(activations="float32")  # as a GPU keeps them, nearly
    ours = open_decoder(bundle, "cuda", "cuda", floats)
    with Session(bundle, "cpu", "native", floats) as native:
        suite = embedded_suite(native, read_suite(HELDOUT)).part(n_lines)
        answers, klds = [], []
        with progress() as bar:
            task = bar.add_task(build.label, total=len(suite.lines))
            for expected, found in answered(native.decoder, ours, suite, native.codec.end_id):
                answers.append(expected.argmax(-1) == found.argmax(-1))
                klds.append(kl_divergence(expected, found))
                bar.advance(task)
                if len(answers) % _BETWEEN == 0:
                    yield _row(build.label, answers, klds)
    yield _row(build.label, answers, klds)


def _row(label: str, answers: Sequence[np.ndarray], klds: Sequence[np.ndarray]) -> EmulatedAnswers:
    same, kld = np.concatenate(answers), np.concatenate(klds)
    return EmulatedAnswers(
        build=label,
        lines=len(answers),
        same_answers=sum(bool(a.all()) for a in answers),
        tokens=len(same),
        same_tokens=int(same.sum()),
        kld_mean=float(f"{kld.mean():.3g}"),
        kld_max=float(f"{kld.max():.3g}"),
    )


def answered(native: Decoder, ours: Decoder, suite: TokenizedSuite, end_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each line the logits (n, vocab) float32 before each token of the native decoder's answer: native's and ours."""
    assert suite.embeddings is not None
    states = [with_image_state(suite.lines, look_at(decoder, suite.embeddings)) for decoder in (native, ours)]
    for (line, seen), (_, looked) in zip(*states, strict=True):
        expected = greedy_logits(native, line, seen.copy(), None, end_id)
        yield expected, greedy_logits(ours, line, looked.copy(), expected.argmax(-1).tolist(), end_id)


def greedy_logits(
    decoder: Decoder, line: TokenizedLine, state: DecoderState, answer: Sequence[int] | None, end_id: int
) -> np.ndarray:
    """Return the logits before each token of an answer, (n, vocab) float32.

    Args:
        decoder: that runs.
        line: whose prompt is read.
        state: after its image; changed.
        answer: tokens to follow; None for the decoder's own likeliest ones, until the end token.
        end_id: the end token.
    """
    logits = [decoder.prefill(decoder.embed(list(line.prompt)), state)]
    while len(logits) < (_LONGEST if answer is None else len(answer)):
        token = int(logits[-1].argmax()) if answer is None else answer[len(logits) - 1]
        if token == end_id:
            break
        logits.append(decoder.step(token, state))
    return np.stack(logits)


main = main_of(emulated_answers)

if __name__ == "__main__":
    main()
