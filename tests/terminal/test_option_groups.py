"""Grouped options: the sections of `--help`, its example, and that every command has them."""

import click
import pytest

from cobra_edge.terminal.option_groups import GROUPS, Command, option
from cobra_edge.terminal.usage import Group


def help_of(command: click.Command, width: int = 80) -> str:
    return click.Context(command, info_name="demo", terminal_width=width, help_option_names=["-h", "--help"]).get_help()


@click.command(
    cls=Command, epilog='Example: demo BUNDLE --image scene.png --prompt "What is in the image?" --max-new-tokens 20'
)
@option("--threads", group="advanced", type=click.IntRange(1, 8), help="CPU threads.")
@option("--json", group="output", is_flag=True, help="Print JSON.")
@option("--image", group="input", help="Image file.")
@option("--prompt", group="input", required=True, help="Question.")
@option("--a-very-long-name-of-an-option", group="input", default=3.5, help="Number.")
@option("--secret", group="input", hidden=True, help="Not shown.")
@click.option("--plain", help="An option of click's.")
def demo(**_options: object) -> None:
    """Demonstrate."""


def test_sections_have_the_order_of_the_groups_and_one_column() -> None:
    assert (
        help_of(demo)
        == """\
Usage: demo [OPTIONS]

  Demonstrate.

Input options:
  --image TEXT       Image file.
  --prompt TEXT      Question.  [required]
  --a-very-long-name-of-an-option FLOAT
                     Number.  [default: 3.5]

Output options:
  --json             Print JSON.

Advanced options:
  --threads INTEGER  CPU threads.  [1<=x<=8]

General options:
  --plain TEXT       An option of click's.
  -h, --help         Show this message and exit.

Example:
  demo BUNDLE --image scene.png --prompt "What is in the image?" \\
    --max-new-tokens 20"""
    )


def test_a_group_has_sections_too() -> None:
    group = Group(
        "demo", commands={"demo": demo}, params=[click.Option(["--plain"], help="An option of click's.")], epilog="See docs."
    )
    text = help_of(group)
    assert text.index("General options:") < text.index("Commands:") < text.index("See docs.")
    assert "Example:" not in text


def test_an_unknown_group_is_refused() -> None:
    broken = option("--x", group="outptu")(lambda: None)  # type: ignore[arg-type]
    command = click.command(cls=Command)(broken)
    with pytest.raises(KeyError, match="outptu"):
        help_of(command)
    assert "outptu" not in GROUPS
