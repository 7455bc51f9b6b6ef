"""`cobra-edge COMMAND`, the same as `python -m cobra_edge COMMAND` and `python -m cobra_edge.COMMAND`."""

from __future__ import annotations

import importlib

import click

from .terminal.output import debug_option, main_of
from .terminal.usage import Group
from .version import __version__

# Commands are imported when they are called: `run` must start at once on a device that lacks what `export` needs.
COMMANDS = {
    "export": "Export a checkpoint as a bundle for a device.",
    "calibrate": "Collect calibration statistics of a checkpoint.",
    "sensitivity": "Measure the sensitivity of each matrix to quantization.",
    "build": "Build the TensorRT engine of a bundle, on the device that will run it.",
    "run": "Ask a bundle about an image.",
    "chat": "Chat with a bundle about images, in a terminal or through pipes.",
    "watch": "Ask a bundle the same question about every new image of a camera or a directory.",
    "serve": "Answer OpenAI's clients, and a page in a browser.",
    "regress": "Compare a bundle with its float model: intervals, budget, exit code.",
    "inspect": "Print what is in a bundle, after checking it.",
    "bench": "Measure, and keep the result.",
}


# Those of several files are packages; the others are modules at the root.
_MODULES = {name: f".{name}.command" for name in ("export", "calibrate", "chat", "watch", "serve", "regress", "bench")}


class _Commands(Group):
    noun = "command"

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(_MODULES.get(name, f".{name}"), __package__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, epilog="Example: cobra-edge export --target jetson")
@click.version_option(__version__)
@debug_option
def command() -> None:
    """Quantized Mamba vision-language models on the edge."""


main = main_of(command)
