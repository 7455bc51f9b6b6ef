"""Build: compile the TensorRT engine of a bundle, on the device that will run it.

python -m cobra_edge.build bundles/cobra-mini-jetson-orin-nano-best
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from .bundle.reader import Bundle
from .terminal.option_groups import Command, option
from .terminal.output import cell, debug_option, main_of, megabytes, print_json, results, stages, tell
from .vision.engines.cache import EngineCache
from .vision.engines.tensorrt_build import engine_of


@click.command(cls=Command, epilog="Example: cobra-edge build BUNDLE")
@click.argument("bundle", type=click.Path(path_type=Path))
@option(
    "--cache",
    group="output",
    type=click.Path(path_type=Path),
    help="Directory for the engine. Default: the user's cache directory.",
)
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object.")
@option("--force", group="advanced", is_flag=True, help="Rebuild an engine that is in the cache.")
@debug_option
def command(bundle: Path, cache: Path | None, force: bool, as_json: bool) -> None:
    """Build BUNDLE's TensorRT engine for this machine's GPU and cache it.

    It takes minutes; otherwise the first run of the bundle builds it. The precision is that of the vision graph: see export
    --vision-precision.

    Exit codes: 0 the engine is in the cache; 2 the bundle is incomplete or has no vision encoder; 3 this machine lacks
    TensorRT, a supported GPU, memory or disk space; 130 interrupted, nothing is left behind.
    """
    built = engine_of(Bundle.open(bundle), EngineCache(cache), stages, tell, force=force)
    if as_json:
        print_json(built)
        return
    key = built.key
    table = Table(title="TensorRT engine", title_justify="left", show_header=False)
    table.add_row("file", cell(built.file))
    table.add_row("size", megabytes(built.bytes))
    table.add_row("built", "no, found in the cache" if built.seconds is None else f"in {built.seconds:,.0f} s")
    if built.workspace_bytes is not None:
        table.add_row("workspace", f"at most {megabytes(built.workspace_bytes)}")
    table.add_row("TensorRT", cell(key.version))
    table.add_row("GPU", cell(f"{key.gpu}, compute capability {', '.join(key.capabilities)}"))
    table.add_row("precision", key.precision)
    table.add_row("graph", cell(key.onnx_sha256))
    results.print(table)


main = main_of(command)

if __name__ == "__main__":
    main()
