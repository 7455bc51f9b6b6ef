"""`python -m bench.gpu_weights SHAPE SCHEME`: the bundle of random weights that the steps of bench/gpu.sh measure."""

from __future__ import annotations

import click

from cobra_edge.bench.decode_request import BUNDLES
from cobra_edge.bench.random_bundle import random_bundle
from cobra_edge.bench.shapes import shape_named
from cobra_edge.terminal.option_groups import Command
from cobra_edge.terminal.output import debug_option, main_of, progress, say


@click.command(cls=Command, epilog="Example: python -m bench.gpu_weights cobra-3b w4a16-g128")
@click.argument("shape")
@click.argument("scheme")
@debug_option
def gpu_weights(shape: str, scheme: str) -> None:
    """Make the bundle of random weights that `bench decode` makes for SHAPE and SCHEME, ahead of it."""
    with progress() as bar:
        bundle = random_bundle(shape_named(shape).mamba, scheme, BUNDLES / f"bench-{shape}-{scheme}", bar)
    say(f"{bundle.directory}")


main = main_of(gpu_weights)

if __name__ == "__main__":
    main()
