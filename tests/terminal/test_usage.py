"""What a command line gets to hear: help, near names, and our own words where it cannot be read."""

import shlex
import subprocess
import sys

import click
import pytest

from bench.__main__ import command as laboratory
from cobra_edge.bench.command import LABORATORY
from cobra_edge.cli import COMMANDS
from cobra_edge.cli import command as cobra_edge
from cobra_edge.terminal.option_groups import Command, GroupedOption
from cobra_edge.terminal.output import run_command
from cobra_edge.terminal.suggestions import COMMAND_SYNONYMS, OPTION_SYNONYMS, close_matches, near_matches


def commands(group: click.Command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Return every command below a group with the words that call it, groups included."""
    found = [(path, group)]
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            found += commands(command, (*path, name))
    return found


ALL = commands(cobra_edge)
GROUPS = [path for path, command in ALL if isinstance(command, click.Group)]


@pytest.mark.parametrize("path", GROUPS, ids=" ".join)
def test_a_bare_group_prints_its_help_and_did_nothing(path: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    code = run_command(cobra_edge, path)
    out, err = capfd.readouterr()
    assert code == 2  # a script whose variable is empty must not pass for a drift that is within its budget
    assert out == "" and err.startswith("Usage: ") and "error" not in err.splitlines()[0]
    assert "--help" in err and "Traceback" not in err


@pytest.mark.parametrize("path", [path for path, _ in ALL], ids=" ".join)
def test_help_comes_by_either_name_and_fits_a_terminal(
    path: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for name in ("-h", "--help"):
        assert run_command(cobra_edge, [*path, name]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("Usage: ")
    assert max(map(len, texts[0].splitlines())) <= 80
    assert "-h, --help" in texts[0] and "Example:" in texts[0]


@pytest.mark.parametrize("path", [path for path, command in ALL if isinstance(command, Command)], ids=" ".join)
def test_every_option_has_a_group_and_the_example_can_be_read(path: tuple[str, ...]) -> None:
    command = dict(ALL)[path]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert isinstance(parameter, GroupedOption) and parameter.help, parameter.name
    example = (command.epilog or "").removeprefix("Example: ")
    words = shlex.split(example)
    assert words[: len(path) + 1] == ["cobra-edge", *path]
    command.make_context(path[-1], words[len(path) + 1 :])  # raises where an option of it is unknown


@pytest.mark.parametrize("module", ["cobra_edge", "cobra_edge.run", "cobra_edge.regress"])
def test_a_module_knows_h_too(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "-h"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage: ") and not done.stderr


def test_an_option_without_its_value_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(cobra_edge, ["run", "b", "--prompt"]) == 2
    assert capfd.readouterr().err.startswith("error: --prompt is not used so: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--picture", "x"], "unknown option --picture; did you mean --image?"),
        (["run", "--promt", "x"], "unknown option --promt; did you mean --prompt?"),
        (["run", "--question", "x"], "unknown option --question; did you mean --prompt?"),
        (["run", "--max-tokens", "3"], "unknown option --max-tokens; did you mean --max-new-tokens?"),
        (["serve", "--prot", "80"], "unknown option --prot; did you mean --port?"),
        (["serve", "--gpu"], "unknown option --gpu; did you mean --device?"),
        (["export", "--traget", "jetson"], "unknown option --traget; did you mean --target?"),
        (["export", "--model", "x"], "unknown option --model; did you mean --checkpoint?"),
        (["export", "--verbose"], "unknown option --verbose; did you mean --debug?"),
        (["regress", "b", "--bugdet", "x"], "unknown option --bugdet; did you mean --budget?"),
        (["inspect", "--xyzzy"], "unknown option --xyzzy;"),
        (["expotr"], "unknown command 'expotr'; did you mean 'export'? known: export, "),
        (["quantize"], "unknown command 'quantize'; did you mean 'export'?"),
        (["xyzzy"], "unknown command 'xyzzy'; known: export, "),
        (["bench", "decod"], "unknown command 'decod'; did you mean 'decode'?"),
        (["regress", "comapre"], "'comapre' is neither a bundle nor a command; did you mean 'compare'?"),
        (["run", "--prompt", "x"], "BUNDLE is missing;"),
        (["run", "b"], "--prompt is missing;"),
        (["run", "b", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: "),
        (["run", "b", "--device", "cudaa", "--prompt", "x"], "--device: "),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(cobra_edge, arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {says}") and err.rstrip().endswith(" --help")


@pytest.mark.parametrize(
    ("got", "known", "near"),
    [
        ("picture", ["temperature", "image"], []),
        ("traget", ["budget", "target"], ["target"]),
        ("w4a16", ["w4a16-g128", "w4a16-g64", "w8a8"], ["w4a16-g128", "w4a16-g64"]),
        ("rtx-409", ["rtx-4090", "rtx-4060", "jetson"], ["rtx-4090", "rtx-4060"]),
        ("RTX_4090", ["rtx-4090", "rtx-4060"], ["rtx-4090", "rtx-4060"]),
        ("gptqq", ["rtn", "gptq", "awq-gptq"], ["gptq"]),
        ("x", ["a", "b", "c", "d"], []),
        ("", ["a", "image"], []),
        ("mini", ["cobra+3b"], []),
        ("a" * 100_000, ["image"], []),
    ],
)
def test_near_is_near(got: str, known: list[str], near: list[str]) -> None:
    assert close_matches(got, known) == near


def test_a_word_of_the_same_meaning_is_offered_where_the_command_has_it() -> None:
    assert close_matches("--picture", ["--image", "--prompt", "--temperature"], OPTION_SYNONYMS) == ["--image"]
    assert close_matches("--picture", ["--prompt", "--temperature"], OPTION_SYNONYMS) == []
    assert near_matches("picture", ["image"]) == "; known: image"  # only options and commands have synonyms


def test_synonyms_lead_to_what_exists() -> None:
    options = {name.lstrip("-") for _, command in ALL for param in command.params for name in param.opts}
    assert all(row & options for row in OPTION_SYNONYMS)
    assert all(row & set(COMMANDS) for row in COMMAND_SYNONYMS)


@pytest.mark.parametrize("name", LABORATORY)
def test_what_moved_to_the_laboratory_is_told_where(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(cobra_edge, ["bench", name]) == 2
    assert f"python -m bench.{name}" in capfd.readouterr().err
    assert name in laboratory.commands
