"""The baseline of a build: golden lines in its own bundle, another bundle, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.reader import GOLDEN, MANIFEST, TOKENIZER, Bundle
from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..inference.session import Session
from ..model.checkpoint_hash import hashed
from ..suite.tokenized import TokenizedSuite
from .golden import Golden, read_golden
from .predictions import Prediction, predictions

FP16 = "fp16"  # the golden lines


@dataclass(frozen=True, eq=False)
class Reference:
    """An opened baseline.

    Attributes:
        kind: "golden", "bundle" or "checkpoint".
        name: of the file or directory.
        fingerprint: identifies its content.
        computed_by: what runs it, or ran it.
        golden: the golden lines if they are the baseline; the distributions of other baselines are not truncated.
        predictions: yields the predictions of a suite's lines, from an index on.
        session: of a bundle; None for others.
        checkpoint: an opened `model.checkpoint.Checkpoint`; None for others.
    """

    kind: str
    name: str
    fingerprint: str
    computed_by: str
    golden: Golden | None
    predictions: Callable[[TokenizedSuite, int], Iterator[Prediction]]
    session: Session | None = None
    checkpoint: Any = None


def open_baseline(wanted: str, bundle: Bundle, open_session: Callable[[Bundle], Session]) -> Reference:
    """Open a baseline.

    Args:
        wanted: "fp16" for the golden lines of the bundle, the directory of a bundle, or a checkpoint as for an export.
        bundle: the build.
        open_session: opens another bundle with the options of the build.

    Raises:
        InputError: the baseline is of another model, or does not exist.
        MachineError: a library that a checkpoint needs is not installed.
    """
    if wanted == FP16:
        return _golden(bundle)
    if (Path(wanted) / MANIFEST).is_file():
        return _bundle(Path(wanted), bundle, open_session)
    return _checkpoint(wanted, bundle)


def _golden(bundle: Bundle) -> Reference:
    golden = read_golden(bundle)
    entry = bundle.manifest.files[GOLDEN]

    def read(suite: TokenizedSuite, first: int) -> Iterator[Prediction]:
        if suite is golden.suite:
            yield from golden.predictions[first:]
            return
        known = {golden.suite.key(tokenized): i for i, tokenized in enumerate(golden.suite.lines)}
        for tokenized in suite.lines[first:]:
            index = known.get(suite.key(tokenized))
            if index is None:
                raise InputError(
                    f"{suite.name}, line {tokenized.number}: the golden lines of the bundle do not include it; give --baseline "
                    "with the checkpoint or an fp16 bundle, or export with --golden and this suite"
                )
            yield golden.predictions[index]

    return Reference("golden", FP16, entry.sha256, "torch, float32, at export", golden, read)


def _bundle(directory: Path, build: Bundle, open_session: Callable[[Bundle], Session]) -> Reference:
    other = Bundle.open(directory)
    ours, theirs = build.manifest, other.manifest
    if ours.model != theirs.model or ours.source.sha256 != theirs.source.sha256:
        raise InputError(
            f"--baseline {directory}: made from {theirs.source.id} ({theirs.source.sha256[:12]}), this build from "
            f"{ours.source.id} ({ours.source.sha256[:12]}); only builds of one checkpoint can be compared"
        )
    if ours.files[TOKENIZER].sha256 != theirs.files[TOKENIZER].sha256:
        raise InputError(f"--baseline {directory}: its tokenizer differs; export both bundles with the same one")
    session = open_session(other)
    vision = "" if session.vision is None else f"; vision by {session.vision.name}"
    by = f"{session.decoder.name}, {theirs.recipe.scheme}{vision}"
    fingerprint = "".join(sorted(entry.sha256 for entry in theirs.files.values()))
    return Reference(
        "bundle",
        directory.name,
        fingerprint,
        by,
        None,
        lambda suite, first: predictions(session, suite, first),
        session=session,
    )


def _checkpoint(source: str, build: Bundle) -> Reference:
    try:
        from ..model.checkpoint import open_checkpoint
        from .float_reference import float_predictions, float_vision
    except ImportError as error:
        raise MachineError(
            f"--baseline {source}: a checkpoint needs {error.name}; install it with: {install_hint('export')}, or "
            "compare with the bundle's golden lines (--baseline fp16)"
        ) from error
    checkpoint = open_checkpoint(source)
    digest, ours = hashed(checkpoint), build.manifest.source
    if checkpoint.config != build.manifest.model or digest != ours.sha256:
        raise InputError(
            f"--baseline {source}: {checkpoint.source_id} ({digest[:12]}) is not the checkpoint of this build, "
            f"{ours.id} ({ours.sha256[:12]}); only builds of one checkpoint can be compared"
        )
    codec, _ = build.text()

    def read(suite: TokenizedSuite, first: int) -> Iterator[Prediction]:
        see = float_vision(checkpoint, suite)
        return float_predictions(checkpoint, suite.lines[first:], see, replies_end_with=codec.end_id)

    return Reference("checkpoint", source, digest, "torch, float32", None, read, checkpoint=checkpoint)
