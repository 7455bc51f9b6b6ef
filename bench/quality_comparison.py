"""Quality of each quantized build of cobra-mini, compared with peers on the same weights.

Every runner gets the same visual embeddings and tokens of the held-out suite, and is compared with the fp16 build, whose
weights are bit-identical to the checkpoint, run by the native decoder. Each peer is first run with the float weights that it is
about to quantize: if those do not give the reference's answers, the benchmark fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from msgspec.structs import replace

from calibration.make_suites import write_suite
from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.decoder import DecoderOptions, DecoderState
from cobra_edge.errors import MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.session import Session, load
from cobra_edge.regress.answer_logits import answer_logits
from cobra_edge.regress.metrics import kl_divergence
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.suite.tokenized import TokenizedSuite, tokenized_suite
from cobra_edge.terminal.output import progress

from .builds import BUILDS, REFERENCE, Build
from .held_out import Answers, against, figures
from .quality_llamacpp import LlamaCppLibrary, OnLines, PeerLibrary, RunnerOutput
from .quality_result import Comparison, KldComparison, NotMeasured, QualityRow, SuiteFigures
from .stored_bits import bundle_bits

# Largest mean KLD in nats of a float form; a different order of float32 sums gives about 1e-12.
AGREEMENT = 1e-8
_GOLDEN_LINES = 1  # of the exported bundles, which are not used here


def measure(folder: Path, peer_python: str, only: Collection[str] = (), builds: Sequence[Build] = BUILDS) -> Comparison:
    """Measure the reference, builds and peers.

    Args:
        folder: for bundles and files.
        peer_python: Python interpreter that has llama-cpp-python.
        only: labels to measure; empty for all. The reference is always measured.
        builds: ours, and peers that our runtime runs.

    Returns:
        The reference, builds and peers.

    Raises:
        MachineError: a float form differs from the reference, a peer fails, or a library that our builds need is missing.
        InputError: the interpreter cannot be started.
    """
    lines = read_suite(HELDOUT)
    bundle, session, reference = _run_build(REFERENCE, folder, lines)
    rows = _Rows(embedded_suite(session, lines), reference)
    for library in _libraries(bundle, folder, peer_python):
        labels = [label for label in library.peers if not only or label in only]
        if labels:
            rows.add_library(library, labels)
    for build in builds:
        if not only or build.label in only:
            rows.add_build(build, folder, lines)
    return rows.comparison()


class _Rows:
    """The rows so far, and the answers behind them."""

    def __init__(self, suite: TokenizedSuite, reference: RunnerOutput) -> None:
        self._suite, self._reference = suite, reference.logits
        self._truth = Answers.of(reference.logits, reference.logits, suite)
        self._answers: dict[str, Answers] = {}
        self._missing: list[NotMeasured] = []
        self._agreement: dict[str, float] = {}
        found = figures(self._truth, self._truth, suite)
        self._rows = [_row(REFERENCE.label, "reference", 16, reference, found)]

    def _add(self, label: str, kind: str, weight_bits: int, found: RunnerOutput) -> None:
        answers = self._answers[label] = Answers.of(found.logits, self._reference, self._suite)
        self._rows.append(_row(label, kind, weight_bits, found, figures(answers, self._truth, self._suite)))

    def add_library(self, library: PeerLibrary, labels: Sequence[str]) -> None:
        """Measure peers of one library, after its float form has been verified."""
        reason, total = library.refuses(), len(self._suite.lines)
        if reason is not None:
            self._missing += [NotMeasured(label, library.peers[label], reason) for label in labels]
            return
        floats = _watched(f"{library.name}, float", total, partial(library.answer_in_float, self._suite))
        self._agreement[library.name] = require_agreement(library.name, floats, self._reference)
        for label in labels:
            found = _watched(label, total, partial(library.answer, label, self._suite))
            self._add(label, "peer", library.peers[label], found)

    def add_build(self, build: Build, folder: Path, lines: list[Line]) -> None:
        """Export and measure a build; a peer whose library is missing is not measured."""
        try:
            found = _run_build(build, folder, lines)[2]
        except MachineError as error:
            if not build.peer:
                raise
            self._missing.append(NotMeasured(build.label, build.weight_bits, str(error)))
            return
        self._add(build.label, "peer" if build.peer else "ours", build.weight_bits, found)

    def comparison(self) -> Comparison:
        """Return all rows: the reference, ours, each compared with every peer, then peers."""
        ours, peers = ([row for row in self._rows if row.kind == kind] for kind in ("ours", "peer"))
        compared = [replace(row, against={peer.label: self._against(row, peer) for peer in peers}) for row in ours]
        rows = (self._rows[0], *compared, *peers)
        return Comparison(rows=rows, not_measured=tuple(self._missing), float_agreement=self._agreement)

    def _against(self, ours: QualityRow, peer: QualityRow) -> KldComparison:
        return against(self._answers[ours.label], self._answers[peer.label], self._suite)


def known_labels() -> list[str]:
    """Return all labels of builds and peers."""
    from .quality_torch import HQQ, TORCHAO

    return [*(b.label for b in BUILDS), *LlamaCppLibrary.peers, *(p.label for p in (*TORCHAO, *HQQ))]


def require_agreement(name: str, logits: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Return the mean KLD of a float form; raise MachineError if it exceeds AGREEMENT or is not finite.

    Args:
        name: of the library.
        logits, reference: of each line (n, vocab) float32.
    """
    kld = float(np.concatenate([kl_divergence(a, b) for a, b in zip(reference, logits, strict=True)]).mean())
    if not kld <= AGREEMENT:
        raise MachineError(
            f"{name} with float weights differs from the reference: mean KLD {kld:.3g}, allowed {AGREEMENT:g}; its quantized "
            "form is not measured"
        )
    return kld


def _libraries(bundle: Bundle, folder: Path, peer_python: str) -> list[PeerLibrary]:
    from .quality_torch import HQQ, TORCHAO, TorchLibrary

    config = bundle.manifest.model.mamba
    tensors = {name: np.asarray(values) for name, values in bundle.decoder_tensors().items()}
    gguf = folder / "gguf"
    gguf.mkdir()
    return [
        LlamaCppLibrary(config, tensors, gguf, peer_python),
        TorchLibrary("torchao", TORCHAO, config, tensors),
        TorchLibrary("hqq", HQQ, config, tensors),
    ]


def _run_build(build: Build, folder: Path, lines: list[Line]) -> tuple[Bundle, Session, RunnerOutput]:
    """Export a build and run the suite through our runtime."""
    goal = folder / build.label.replace(" ", "-")
    target, budget = target_named(build.target), budget_without_limits(folder)
    lines_of = {} if build.draw is None else {"calibration": _drawn(folder, build.draw), "golden": HELDOUT}
    options = {"golden_lines": _GOLDEN_LINES, "budget": budget, **lines_of, **build.export}
    exported = export_bundle("mini", target, goal, **options)
    bundle = Bundle.open(exported.directory)
    recipe = bundle.manifest.recipe
    activations = build.activations or recipe.activations
    session = load(bundle, options=DecoderOptions(activations=activations))

    suite = _tokenized(session, lines)

    def look(image: int | None) -> DecoderState:
        return session.decoder.new_state() if image is None else session.look(suite.load(image))

    def run(on_lines: OnLines) -> list[np.ndarray]:
        found = list[np.ndarray]()
        for logits in answer_logits(session.decoder, suite.lines, look):
            found.append(logits)
            on_lines(len(found))
        return found

    logits = _watched(build.label, len(lines), run)
    facts = {"export": dict(build.export), "method": recipe.method, "rotations": recipe.rotations, "draw": build.draw}
    facts |= {"runtime": f"cobra_edge {session.decoder.name}", "activations": activations}
    return bundle, session, RunnerOutput(logits, bundle_bits(bundle), facts)


def _drawn(folder: Path, seed: int) -> Path:
    """Draw a calibration set as large as both embedded ones; return its lines."""
    whole = folder / f"draw-{seed}" / "lines.jsonl"
    if not whole.exists():
        parts = write_suite("calibration", whole.parent, seed)
        whole.write_bytes(b"".join((whole.parent / f"{part}.jsonl").read_bytes() for part in parts))
    return whole


def _watched(what: str, total: int, run: Callable[[OnLines], Any]) -> Any:
    with progress() as bar:
        task = bar.add_task(f"held-out suite, {what}", total=total)
        return run(lambda done: bar.update(task, completed=done))


def _tokenized(session: Session, lines: list[Line]) -> TokenizedSuite:
    numbered, load = list(enumerate(lines, 1)), HELDOUT.parent.joinpath
    return tokenized_suite(HELDOUT.name, numbered, load, session.codec, session.template, sees=True, skipped={})


def embedded_suite(session: Session, lines: list[Line]) -> TokenizedSuite:
    """Tokenize the held-out suite and compute its embeddings with the session's vision graph; every line has an image."""
    suite = _tokenized(session, lines)
    embeddings = [session.visual_embeddings(suite.load(image)) for image in range(len(suite.images))]
    return dataclasses.replace(suite, embeddings=np.stack(embeddings))


def _row(label: str, kind: str, weight_bits: int, output: RunnerOutput, found: SuiteFigures) -> QualityRow:
    return QualityRow(
        label=label,
        kind=kind,
        weight_bits=weight_bits,
        bits_matrices=round(output.bits.matrices, 4),
        bits_all=round(output.bits.all, 4),
        **structs.asdict(found),
        **output.facts,
    )
