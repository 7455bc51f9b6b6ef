"""What exports of one model have in common is computed once: the vision graph and the float model's answers know no scheme."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cobra_edge.bundle.reader import GOLDEN, IMAGE, VISION
from cobra_edge.export import pipeline as assemble


def sharing_exports(kept: Path) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which exports of cobra-mini take the vision graph and the golden lines from the first of their kind.

    Args:
        kept: directory for them.
    """
    vision = _remembered(assemble.write_vision, (VISION, IMAGE), 2, kept / "vision")
    golden = _remembered(assemble._write_golden, (GOLDEN,), 4, kept / "golden")

    @contextmanager
    def sharing() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assemble, "write_vision", vision)
            patch.setattr(assemble, "_write_golden", golden)
            yield

    return sharing


def _remembered(compute: Callable[..., Any], files: tuple[str, ...], stage: int, kept: Path) -> Callable[..., Any]:
    """Return a function that runs `compute` once for the same lines and words, and then copies the files that it wrote.

    Args:
        compute: writes files into one of its arguments.
        files: their names.
        stage: which argument that is.
        kept: where they are kept.
    """
    results = dict[tuple[object, ...], Any]()

    def run(*arguments: Any) -> Any:
        lines = next(len(getattr(a, "lines", a)) for a in arguments if hasattr(a, "lines") or isinstance(a, list))
        asked = (lines, *(str(a) for i, a in enumerate(arguments) if i != stage and isinstance(a, str | Path)))
        folder = kept / str([*results, asked].index(asked))
        if asked not in results:
            results[asked] = compute(*arguments)
            folder.mkdir(parents=True)
            for name in files:
                shutil.copyfile(arguments[stage] / name, folder / name)
        for name in files:
            shutil.copyfile(folder / name, arguments[stage] / name)
        return results[asked]

    return run
