"""Run tasks of lm-eval on a bundle.

python -m cobra_edge.regress lm-eval BUNDLE --tasks arc_easy --limit 100
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


@click.command("lm-eval", cls=Command, epilog="Example: cobra-edge regress lm-eval BUNDLE --tasks arc_easy --limit 100")
@harness_options
def lm_eval(
    opening: Opening,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    raw_prompts: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluate BUNDLE on tasks of EleutherAI's lm-evaluation-harness."""
    names = names_of(tasks)
    if out is not None:
        require_writable(out)
    with harness("lm_eval", "eval"):
        from .lm_eval import CobraEdgeLM, evaluate

        lm = CobraEdgeLM(
            opening.bundle,
            opening.device,
            opening.kernels,
            opening.vision_runtime,
            opening.options.threads,
            opening.options.activations,
            raw_prompts,
        )
        found = evaluate(lm, names, include_path, limit, num_fewshot)
    finish(report_of("lm-eval", version("lm-eval"), lm.model_adapter, found), out, as_json)
