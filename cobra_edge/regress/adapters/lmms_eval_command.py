"""Run tasks of lmms-eval on a bundle.

python -m cobra_edge.regress lmms-eval BUNDLE --tasks pope --limit 100
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import click

from ...inference.session_options import Opening
from ...terminal.option_groups import Command
from .harness_command import finish, harness, harness_options
from .report import report_of, require_writable
from .task_names import names_of


@click.command("lmms-eval", cls=Command, epilog="Example: cobra-edge regress lmms-eval BUNDLE --tasks pope --limit 100")
@harness_options
def lmms_eval(
    opening: Opening,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    raw_prompts: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluate BUNDLE on tasks of lmms-eval."""
    names = names_of(tasks)
    if out is not None:
        require_writable(out)
    with harness("lmms_eval", "lmms"):
        from .lmms_eval import CobraEdgeLMM, evaluate

        lm = CobraEdgeLMM(
            opening.bundle,
            opening.device,
            opening.kernels,
            opening.vision_runtime,
            opening.options.threads,
            opening.options.activations,
            raw_prompts,
        )
        found = evaluate(lm, names, include_path, limit, num_fewshot)
    finish(report_of("lmms-eval", version("lmms-eval"), lm.model_adapter, found), out, as_json)
