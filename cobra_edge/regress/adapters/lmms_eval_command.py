"""Run tasks of lmms-eval on a bundle.

python -m cobra_edge.regress lmms-eval BUNDLE --tasks pope --limit 100
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import click

from .harness_command import finish, harness, harness_options
from .report import require_writable
from .task_names import names_of


@click.command("lmms-eval", epilog="Example: python -m cobra_edge.regress lmms-eval BUNDLE --tasks pope --limit 100")
@harness_options
def lmms_eval(
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
    """Run tasks of lmms-eval on BUNDLE."""
    names = names_of(tasks)
    if out is not None:
        require_writable(out)
    with harness("lmms_eval", "lmms"):
        from .lmms_eval import CobraEdgeLMM, evaluate

        lm = CobraEdgeLMM(bundle, device, decoder_kernels, vision_runtime, threads, activations, raw_prompts)
        found = evaluate(lm, names, include_path, limit, num_fewshot)
    finish("lmms-eval", version("lmms-eval"), lm.model_adapter, found, out, as_json)
