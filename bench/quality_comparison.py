"""Quality: how well each quantized build of cobra-mini answers, beside peers on the same weights.

Every runner gets the same visual embeddings and the same tokens of the held-out suite, and is compared with the fp16 build,
which has the checkpoint's weights bit for bit, run by the native decoder. A peer is first asked with the weights it is about to
quantize: where those do not give the reference's answers, its figures would be of another model, and the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.errors import MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.recipe import MIXED
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.session import Session, load
from cobra_edge.regress.accuracy import run_suite
from cobra_edge.regress.metrics import kl_divergence
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.terminal.output import progress

from .builds import BUILDS, REFERENCE, Build
from .held_out import Answers, Questions, against, figures
from .quality_llamacpp import LlamaCppLibrary, OnLines, PeerLibrary, RunnerOutput
from .stored_bits import bundle_bits

# Largest mean KLD, in nats, that a peer's float form may have: float32 summed in another order gives some 1e-12.
AGREEMENT = 1e-8
_GOLDEN_LINES = 1  # the suite is the measurement; the bundle's own needs no more than to be whole


def measure(folder: Path, peer_python: str, only: Collection[str] = (), builds: Sequence[Build] = BUILDS) -> dict[str, Any]:
    """Measure the reference, builds and peers.

    Args:
        folder: where bundles and files may be put.
        peer_python: an interpreter that has llama-cpp-python.
        only: labels to measure; empty for all. The reference always is.
        builds: of ours, and peers that our runtime runs.

    Returns:
        rows, and the largest mean KLD of a float form by family.

    Raises:
        MachineError: a peer's float form does not agree, or its library fails; a library that a build of ours needs is missing.
        InputError: the peers' interpreter cannot be started.
    """
    lines = read_suite(HELDOUT)
    bundle, session, reference = _run_build(REFERENCE, folder, lines)
    contest = Comparison(questions_of(session, lines), reference)
    for family in _libraries(bundle, folder, peer_python):
        labels = [label for label in family.peers if not only or label in only]
        if labels:
            contest.run_library(family, labels)
    for build in builds:
        if not only or build.label in only:
            contest.run_build(build, folder, lines)
    return {"rows": contest.judged(), "float_agreement": contest.agreement}


class Comparison:
    """The rows so far, and the answers they were made from."""

    def __init__(self, questions: Questions, reference: RunnerOutput) -> None:
        self._questions, self._reference = questions, reference.logits
        self._truth = Answers.of(reference.logits, reference.logits, questions)
        self._answers: dict[str, Answers] = {}
        self._rows = [_row(REFERENCE.label, "reference", 16, reference) | figures(self._truth, self._truth, questions)]
        self.agreement: dict[str, float] = {}

    def _add(self, label: str, kind: str, weight_bits: int, found: RunnerOutput) -> None:
        answers = self._answers[label] = Answers.of(found.logits, self._reference, self._questions)
        self._rows.append(_row(label, kind, weight_bits, found) | figures(answers, self._truth, self._questions))

    def run_library(self, family: PeerLibrary, labels: Sequence[str]) -> None:
        """Ask peers of one library, after its float form has agreed."""
        reason, total = family.refuses(), len(self._questions.tokens)
        if reason is not None:
            self._rows += [_not_measured(label, family.peers[label], reason) for label in labels]
            return
        floats = _watched(f"{family.name}, float", total, partial(family.answer_in_float, self._questions))
        self.agreement[family.name] = require_agreement(family.name, floats, self._reference)
        for label in labels:
            found = _watched(label, total, partial(family.answer, label, self._questions))
            self._add(label, "peer", family.peers[label], found)

    def run_build(self, build: Build, folder: Path, lines: list[Line]) -> None:
        """Export and ask a build; a peer's that this machine cannot make is not measured."""
        try:
            found = _run_build(build, folder, lines)[2]
        except MachineError as error:
            if not build.peer:
                raise
            self._rows.append(_not_measured(build.label, build.weight_bits, str(error)))
            return
        self._add(build.label, "peer" if build.peer else "ours", build.weight_bits, found)

    def judged(self) -> list[dict[str, Any]]:
        """Return all rows, the reference first, ours before peers and each of them compared with every peer."""
        ours, peers = ([r for r in self._rows if r["kind"] == kind] for kind in ("ours", "peer"))
        for row in ours:
            met = {p["label"]: self._answers[p["label"]] for p in peers if p["label"] in self._answers}
            mine = self._answers[row["label"]]
            row["against"] = {label: against(mine, other, self._questions) for label, other in met.items()}
        return [self._rows[0], *ours, *peers]


def known_labels() -> list[str]:
    """Return every label that can be asked for."""
    from .quality_torch import HQQ, TORCHAO

    return [*(b.label for b in BUILDS), *LlamaCppLibrary.peers, *(p.label for p in (*TORCHAO, *HQQ))]


def require_agreement(name: str, logits: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Return the mean KLD of a peer's float form. Raises MachineError where it is above AGREEMENT or not finite."""
    kld = float(np.concatenate([kl_divergence(a, b) for a, b in zip(reference, logits, strict=True)]).mean())
    if not kld <= AGREEMENT:
        raise MachineError(
            f"{name} with float weights differs from the reference: mean KLD {kld:.3g}, allowed {AGREEMENT:g}; its quantized "
            "figures would be of another model, so none is kept"
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
    """Export a build and run the suite through the runtime that ships."""
    goal = folder / build.label.replace(" ", "-")
    budget = folder / "budget.toml"  # of no limits: what a build drifts is the result, whatever it is
    budget.write_text("".join(f'[schemes."{name}"]\n' for name in (*SCHEMES, MIXED)), encoding="utf-8")
    target = target_named("cpu")
    exported = export_bundle("mini", target, goal, golden_lines=_GOLDEN_LINES, budget=budget, **build.export)
    bundle = Bundle.open(exported.directory)
    recipe = bundle.manifest.recipe
    activations = build.activations or recipe.activations
    session = load(bundle, options=DecoderOptions(activations=activations))

    def run(on_lines: OnLines) -> list[np.ndarray]:
        done = iter(range(1, len(lines) + 1))
        return [r.logits for r in run_suite(session, lines, HELDOUT.parent, lambda: on_lines(next(done)))]

    logits = _watched(build.label, len(lines), run)
    facts = {"export": dict(build.export), "method": recipe.method, "rotations": list(recipe.rotations)}
    facts |= {"runtime": f"cobra_edge {session.decoder.name}", "activations": activations}
    return bundle, session, RunnerOutput(logits, bundle_bits(bundle), facts)


def _watched(what: str, total: int, run: Callable[[OnLines], Any]) -> Any:
    with progress() as bar:
        task = bar.add_task(f"held-out suite, {what}", total=total)
        return run(lambda done: bar.update(task, completed=done))


def questions_of(session: Session, lines: list[Line]) -> Questions:
    """Put the suite into numbers; every line of it has an image."""
    names = list(dict.fromkeys(line.image for line in lines if line.image is not None))
    prompts = [session.codec.encode(session.template.first_turn(line.prompt)) for line in lines]
    answers = [session.codec.answer(line.answer) for line in lines]
    return Questions(
        embeddings=np.stack([session.visual_embeddings(HELDOUT.parent / name) for name in names]),
        image=np.array([names.index(line.image or "") for line in lines], np.int32),
        task=tuple(line.task for line in lines),
        tokens=tuple(np.array([*p, *a[:-1]], np.int32) for p, a in zip(prompts, answers, strict=True)),
        answer_from=np.array([len(p) - 1 for p in prompts], np.int32),
        targets=tuple(np.array(a, np.int32) for a in answers),
    )


def _row(label: str, kind: str, weight_bits: int, found: RunnerOutput) -> dict[str, Any]:
    bits = {"bits_matrices": round(found.bits.matrices, 4), "bits_all": round(found.bits.all, 4)}
    return {"label": label, "kind": kind, "weight_bits": weight_bits, **bits, **found.facts}


def _not_measured(label: str, weight_bits: int, reason: str) -> dict[str, Any]:
    return {"label": label, "kind": "peer", "weight_bits": weight_bits, "not_measured": reason}
