"""Build: make the TensorRT engine of a bundle, on the device that will run it.

python -m cobra_edge.build bundles/cobra-mini-jetson-orin-nano-w4a16-g128
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from .bundle.reader import Bundle
from .terminal.output import cell, debug_option, main_of, megabytes, print_json, results, stages, tell
from .vision.engines.cache import EngineCache
from .vision.engines.tensorrt_build import engine_of


@click.command(epilog="Example: python -m cobra_edge.build BUNDLE --json")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), help="Where to keep the engine; default: the user's cache.")
@click.option("--force", is_flag=True, help="Build it even if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def command(bundle: Path, cache: Path | None, force: bool, as_json: bool) -> None:
    """Build BUNDLE's TensorRT engine for this machine's GPU and keep it, unless it is there already.

    It takes minutes, and running the bundle would do it at its first start. The numbers it computes in are the graph's: see
    export --vision-precision. Exit codes: 0 the engine is there; 2 the bundle is not whole or has no vision; 3 this machine
    lacks TensorRT, a GPU that can, memory or disk; 130 interrupted, nothing is left behind.
    """
    built = engine_of(Bundle.open(bundle), EngineCache(cache), stages, tell, force=force)
    if as_json:
        print_json(built)
        return
    key = built.key
    table = Table(title="TensorRT engine", title_justify="left", show_header=False)
    table.add_row("file", cell(built.file))
    table.add_row("size", megabytes(built.bytes))
    table.add_row("built", "was there already" if built.seconds is None else f"now, in {built.seconds:,.0f} s")
    if built.workspace_bytes is not None:
        table.add_row("workspace", f"at most {megabytes(built.workspace_bytes)}")
    table.add_row("TensorRT", cell(key.version))
    table.add_row("gpu", cell(f"{key.gpu}, compute capability {', '.join(key.capabilities)}"))
    table.add_row("precision", key.precision)
    table.add_row("graph", cell(key.onnx_sha256))
    results.print(table)


main = main_of(command)

if __name__ == "__main__":
    main()
