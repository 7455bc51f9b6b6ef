"""`cobra-edge COMMAND`, equivalent to `python -m cobra_edge COMMAND` and `python -m cobra_edge.COMMAND`."""

from __future__ import annotations

import importlib

import click

from .terminal.output import debug_option, main_of
from .terminal.usage import Group

# Commands are imported on demand: `run` must start fast, and on a device without the dependencies of `export`.
COMMANDS = {
    "export": "Export a checkpoint to a bundle for a device.",
    "calibrate": "Collect activation statistics for GPTQ and AWQ.",
    "sensitivity": "Measure how sensitive each matrix is to quantization.",
    "build": "Build the TensorRT engine of a bundle, on its device.",
    "run": "Ask a bundle a question about an image.",
    "chat": "Chat with a bundle, in a terminal or through a pipe.",
    "watch": "Ask the same question about every new image.",
    "serve": "Serve an OpenAI-compatible API and a web page.",
    "regress": "Compare a bundle with its float model; exit code for CI.",
    "inspect": "Verify a bundle and print its contents.",
    "bench": "Benchmark a bundle on this machine.",
    "doctor": "Check what this machine can run, and why not.",
}


# A command of several files is a package, the others are modules.
_MODULES = {
    name: f".{name}.command" for name in ("export", "calibrate", "chat", "watch", "serve", "regress", "bench", "doctor")
}


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


_VERSION_HELP = "Print the version, commit, kernels and libraries, and exit."


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from .doctor.installation import version_text

        click.echo(version_text())
        context.exit()


@click.group(cls=_Commands, epilog="Example: cobra-edge export --target jetson")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help=_VERSION_HELP)
@debug_option
def command() -> None:
    """Quantized Mamba vision-language models on the edge."""


main = main_of(command)
