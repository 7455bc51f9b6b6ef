"""Run tasks of lm-eval on a bundle.

python -m cobra_edge.regress lm-eval BUNDLE --tasks arc_easy --limit 100
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import click

from .harness_command import finish, harness, harness_options
from .report import require_writable
from .task_names import names_of


@click.command("lm-eval", epilog="Example: python -m cobra_edge.regress lm-eval BUNDLE --tasks arc_easy --limit 100")
@harness_options
def lm_eval(
    bundle: Path,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    raw_prompts: bool,
    device: str,
    decoder_kernels: str,
    vision_runtime: str,
    threads: int | None,
    activations: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run tasks of EleutherAI's lm-eval on BUNDLE."""
    names = names_of(tasks)
    if out is not None:
        require_writable(out)
    with harness("lm_eval", "eval"):
        from .lm_eval import CobraEdgeLM, evaluate

        lm = CobraEdgeLM(bundle, device, decoder_kernels, vision_runtime, threads, activations, raw_prompts)
        found = evaluate(lm, names, include_path, limit, num_fewshot)
    finish("lm-eval", version("lm-eval"), lm.model_adapter, found, out, as_json)
