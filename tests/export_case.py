"""What exports of one model have in common is computed once.

The vision graph and the float model's answers know no scheme, and guided quantization knows no target and no activations.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from msgspec.structs import replace

from cobra_edge.bundle.reader import DECODER, GOLDEN, IMAGE, VISION
from cobra_edge.decode import backends
from cobra_edge.export import pipeline


def sharing_exports(kept: Path) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which exports of cobra-mini take graph, golden lines and guided codes from the first of their kind.

    They measure drift on the CPU: a test's emulated GPU would take a minute for what takes the CPU a second.

    Args:
        kept: directory for them; several processes may have the same.
    """
    write_vision, write_golden, write_decoder = pipeline.write_vision, pipeline._write_golden, pipeline._write_decoder

    def vision(checkpoint: Any, images: Any, stage: Path, precision: Any, form: Any, calibration: Path, cache: Any) -> Any:
        key = [*images, precision, form, calibration]
        compute = lambda: write_vision(checkpoint, images, stage, precision, form, calibration, cache)  # noqa: E731
        return _remembered(compute, key, (VISION, IMAGE), stage, kept)

    def golden(checkpoint: Any, suite: Any, embeddings: Any, codec: Any, stage: Path, bar: Any) -> Any:
        compute = lambda: write_golden(checkpoint, suite, embeddings, codec, stage, bar)  # noqa: E731
        return _remembered(compute, [suite.sha256()], (GOLDEN,), stage, kept)

    def decoder(checkpoint: Any, plan: Any, stage: Path, cache: Any, watch: Any) -> Any:
        compute = lambda: write_decoder(checkpoint, plan, stage, cache, watch)  # noqa: E731
        if plan.choice.method != "guided" or plan.options.calibration is not None:
            return compute()
        key = [plan.digest, replace(plan.recipe, activations="float32"), plan.choice.bits]
        recipe, allocation = _remembered(compute, key, (DECODER,), stage, kept)
        return replace(recipe, activations=plan.recipe.activations), allocation

    @contextmanager
    def sharing() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "write_vision", vision)
            patch.setattr(pipeline, "_write_golden", golden)
            patch.setattr(pipeline, "_write_decoder", decoder)
            patch.setattr(backends, "why_no_gpu", lambda: "drift is measured on the CPU")
            yield

    return sharing


def _remembered(compute: Callable[[], Any], key: list[object], files: tuple[str, ...], stage: Path, kept: Path) -> Any:
    """Return the result of the first `compute` with this key, and copy the files that it wrote.

    Args:
        compute: writes files into `stage`.
        key: what its result depends on.
        files: their names.
        stage: where they go.
        kept: where they are kept, with the result.
    """
    folder = kept / hashlib.sha256("\n".join([*files, *map(str, key)]).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        result = folder / "result"
        if not result.exists():
            computed = compute()
            for name in files:
                shutil.copyfile(stage / name, folder / name)
            result.write_bytes(pickle.dumps(computed))
    for name in files:
        shutil.copyfile(folder / name, stage / name)
    return pickle.loads(result.read_bytes())
