"""Inspect: what is in a bundle, checked against its hashes.

python -m cobra_edge.inspect bundles/cobra-mini-jetson-orin-nano-w4a16-g128
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from .bundle import Bundle
from .regress.budget import judge, read_budget
from .tables import bits_per_weight, drift_table, megabytes, memory_table
from .targets import target_named
from .terminal import main_of, print_json, results


@click.command(epilog="Example: python -m cobra_edge.inspect BUNDLE --json")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest and derived figures as one JSON object.")
def command(bundle: Path, as_json: bool) -> None:
    """Print sizes, recipe, drift and memory plan of BUNDLE, after checking that every file is what was exported."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    opened.decoder_tensors()
    if as_json:
        print_json({"manifest": manifest, "bits_per_weight": bits_per_weight(manifest)})
        return
    model, target = manifest.model, target_named(manifest.target)
    eyes = "no vision" if model.vision is None else f"{model.vision.backbone_id}, {model.n_visual_tokens} visual tokens"
    results.print(
        f"{model.model_id} from {manifest.source.id}: {eyes}; Mamba of {model.mamba.n_layer} layers, "
        f"d_model {model.mamba.d_model}, {model.mamba.n_parameters / 1e6:,.1f} M weights, vocabulary {model.mamba.vocab}",
        highlight=False,
    )
    results.print(
        f"for {target.title}: vision by {target.vision_runtime}, decoder by {target.decoder_runtime}", highlight=False
    )
    files = Table(title="files, all as exported", title_justify="left")
    files.add_column("file")
    files.add_column("size", justify="right")
    for name, entry in manifest.files.items():
        files.add_row(name, megabytes(entry.bytes))
    results.print(files)
    recipe = Table(title=f"recipe: {manifest.recipe.scheme}, {manifest.recipe.method}", title_justify="left")
    recipe.add_column("tensor")
    recipe.add_column("stored as")
    for name, storage in manifest.recipe.tensors.items():
        recipe.add_row(name, storage)
    recipe.add_row("all others", "float32")
    results.print(recipe)
    results.print(memory_table(manifest, target))
    verdicts = [] if manifest.drift is None else judge(manifest.drift, read_budget(), manifest.recipe.scheme)
    results.print(drift_table(manifest, verdicts))


main = main_of(command)

if __name__ == "__main__":
    main()
