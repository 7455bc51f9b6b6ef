"""The command run."""

import json

import pytest

from cobra_edge import run
from cobra_edge.terminal.output import run_command

from ..conftest import MINI

QUESTION = "What is in the image?"


@pytest.fixture
def ran(mini_bundle, tiny_bundle, capfd):
    """Return what the command prints for a bundle with vision, or without: its exit code, stdout, stderr."""

    def call(*arguments, blind=False):
        bundle = tiny_bundle if blind else mini_bundle("w4a16-g128")
        capfd.readouterr()  # of the export, if this test is the first to ask for it
        code = run_command(run.command, [str(bundle), "--prompt", QUESTION, *map(str, arguments)])
        return code, *capfd.readouterr()

    return call


def test_a_missing_image_is_reported(ran):
    _, out, err = ran("--max-new-tokens", "200")
    assert out.strip() and err.startswith("no image given (--image): ")
    code, out, err = ran("--json")
    assert code == 0 and json.loads(out)["image"] is None and err.startswith("no image given")
    _, _, err = ran("--max-new-tokens", "2", blind=True)
    assert "no image" not in err


def test_an_image_is_named(ran):
    code, out, err = ran("--image", MINI / "demo.png", "--json")
    assert (code, json.loads(out)["image"], err) == (0, str(MINI / "demo.png"), "")


def test_a_cut_answer_is_marked(ran):
    code, out, err = ran("--image", MINI / "demo.png", "--max-new-tokens", "3")
    assert code == 0 and out.strip() and err == "cut at the token limit; raise it with --max-new-tokens\n"
    _, out, err = ran("--image", MINI / "demo.png", "--max-new-tokens", "3", "--json")
    assert json.loads(out)["finish"] == "length" and err == ""
    assert ran("--image", MINI / "demo.png")[2] == ""
