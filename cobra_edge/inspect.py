"""Inspect: verify a bundle and print its contents.

python -m cobra_edge.inspect bundles/cobra-mini-jetson-orin-nano-best
"""

from __future__ import annotations

from pathlib import Path

import click

from .bundle.reader import Bundle
from .decode.backends import BACKENDS
from .formats.targets import targets
from .regress.budget import read_budget
from .regress.bundle_tables import bits_per_weight, drift_table, memory_table, recipe_line
from .regress.drift import judged_drift
from .regress.golden import read_golden
from .regress.report import Verdict
from .terminal.listing import Listing, Row
from .terminal.option_groups import Command, option
from .terminal.output import cell, debug_option, figure, main_of, megabytes, print_json, results


@click.command(cls=Command, epilog="Example: cobra-edge inspect BUNDLE --json")
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--json", "as_json", group="output", is_flag=True, help="Print the manifest and derived values as one JSON object.")
@debug_option
def command(bundle: Path, as_json: bool) -> None:
    """Verify BUNDLE (hashes, tensors, tokenizer) and print its recipe, memory, decoders on this machine, and drift."""
    opened = Bundle.open(bundle, thorough=True)
    manifest = opened.manifest
    opened.decoder_tensors(thorough=True)
    opened.text()
    if manifest.model.vision is not None:
        opened.image()
    read_golden(opened)
    verdicts = _verdicts(opened)
    if as_json:
        print_json({
            "manifest": manifest,
            "bits_per_weight": bits_per_weight(manifest),
            "memory_total_bytes": manifest.memory_plan.total_bytes,
            "drift_verdicts": verdicts,
            "decoders": [{"kernels": b.name, "device": b.device, "refuses": b.refuses(opened)} for b in BACKENDS],
        })  # fmt: skip
        return
    model, target = manifest.model, targets().get(manifest.target)
    vision = (
        "no vision encoder" if model.vision is None else f"{model.vision.backbone_id}, {model.n_visual_tokens} visual tokens"
    )
    _print(
        f"{model.model_id} from {manifest.source.id}: {vision}; Mamba with {model.mamba.n_layer} layers, "
        f"d_model {model.mamba.d_model}, {model.mamba.n_parameters / 1e6:,.1f} M parameters, vocabulary {model.mamba.vocab}"
    )
    if target is None:
        _print(f"target: {manifest.target}, unknown to this installation")
    else:
        _print(f"target: {target.title}; vision runtime {target.vision_runtime}, decoder {target.decoder_runtime}")
    files = [Row((name, megabytes(entry.bytes))) for name, entry in manifest.files.items()]
    _print(Listing("files, hashes verified", ("file", "size"), files, numbers=(1,)))
    if model.vision is not None:
        _say_vision(opened)
    recipe = [Row(pair) for pair in (*manifest.recipe.tensors.items(), ("all others", "float32"))]
    _print(Listing(f"recipe: {recipe_line(manifest)}", ("tensor", "stored as"), recipe))
    _print(memory_table(manifest, target))
    _print(_decoders(opened))
    _print(drift_table(manifest, verdicts))


def _print(shown: str | Listing) -> None:
    """Print a table with a blank line before it, or text wrapped between words."""
    if isinstance(shown, Listing):
        results.print()
    results.print(cell(shown) if isinstance(shown, str) else shown)


def _decoders(bundle: Bundle) -> Listing:
    """Return a table of the decoder backends: which can run the bundle here, and why others cannot."""
    rows = []
    taken = set[str]()
    for backend in BACKENDS:
        reason = backend.refuses(bundle)
        words = "yes, on request" if backend.device in taken else "yes, default"
        if reason is None:
            taken.add(backend.device)
        rows.append(Row((backend.device, backend.name, words if reason is None else f"no: {reason}")))
    return Listing("decoders on this machine", ("device", "decoder", "runs the bundle"), rows)


def _verdicts(bundle: Bundle) -> tuple[Verdict, ...]:
    """Compare the exported drift with the default budget; empty where that has no limits for the scheme."""
    manifest, budget = bundle.manifest, read_budget()
    if manifest.drift is None or manifest.recipe.scheme not in budget.schemes:
        return ()
    precision = None if manifest.model.vision is None else bundle.vision_graph.precision
    limits = budget.limits_of(manifest.recipe.scheme, precision, manifest.target)
    return judged_drift(manifest.drift, limits, manifest.noise_floor)


def _say_vision(bundle: Bundle) -> None:
    graph = bundle.vision_graph
    far = ", ".join(f"{at} {figure(rms)}" for at, rms in graph.parity.items())
    _print(f"vision graph: {graph.precision}, input {graph.input}; relative RMS error against torch: {far or 'not measured'}")
    if graph.wide:
        _print(f"left in float: {', '.join(graph.wide)}")
    for name, key in bundle.manifest.engines.items():
        gpus = ", ".join(key.capabilities)
        weights = "without weights" if key.stripped else "with weights"
        _print(f"engine {name}: {key.runtime} {key.version}, {key.precision}, compute capability {gpus}, {weights}")


main = main_of(command)

if __name__ == "__main__":
    main()
