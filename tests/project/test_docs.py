"""The documentation's commands and code: run as they are, or checked against the command line if the page says why not."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import yaml

from cobra_edge.cli import command as cobra_edge
from cobra_edge.terminal.output import run_command

from ..conftest import MINI, write_text_only
from ..suite.test_benchmarks import GQA, OCR, POPE, REFCOCO, TEXT_VQA, VIZWIZ, VQA, VQA_ANSWERS, VSR, written
from .doc_blocks import ROOT, Block, blocks, inline_commands, our_arguments, pages

ALL = [block for page in pages() for block in blocks(page)]
NEED = {"datasets": "eval", "lm-eval": "eval", "lmms-eval": "lmms", "watch": "watch", "serve": "serve"}

# Files of published benchmarks under the names that pages use, each with a few records.
BENCHMARKS = {
    "coco_pope_random.json": "\n".join(map(json.dumps, POPE)),
    "test.jsonl": "\n".join(map(json.dumps, VSR)),
    "v2_OpenEnded_mscoco_val2014_questions.json": json.dumps(VQA),
    "v2_mscoco_val2014_annotations.json": json.dumps(VQA_ANSWERS),
    "testdev_balanced_questions.json": json.dumps(GQA),
    "val.json": json.dumps(VIZWIZ),
    "TextVQA_0.5.1_val.json": json.dumps(TEXT_VQA),
    "TextVQA_Rosetta_OCR_v0.2_val.json": json.dumps(OCR),
    "finetune_refcoco_val.json": json.dumps(REFCOCO),
}
IMAGES = {
    "val2014": ["COCO_val2014_000000000007.jpg"],
    "vsr_images": ["000000000001.jpg", "000000000002.jpg"],
    "gqa/images": ["n1.jpg", "n2.jpg"],
    "vizwiz/val": ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"],
    "train_images": ["0a.jpg"],
    "train2014": ["a.jpg"],
}
LINES = [{"prompt": "How are you?", "answer": "4", "task": "count"}, {"prompt": "Is it red?", "answer": "yes", "task": "red"}]
SCENES = [{"image": "scenes/000.png", "question": "Is there a red circle?", "answer": "yes"}]


@pytest.fixture
def workspace(mini_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory for a page's commands, with the files that it names.

    BUNDLE is cobra-mini with 32 golden lines, runs/my-cobra cobra-mini's checkpoint, DIR a Mamba of two layers, scene.png the
    demo image, questions.jsonl two questions, my.jsonl ten, tasks/scenes.jsonl one, budget.toml a wide limit.
    """
    bundle = mini_bundle("w4a16-g128")
    for name in ("BUNDLE", "bundles/cobra-mini-jetson-orin-nano-best"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copytree(bundle, tmp_path / name, copy_function=os.link)
    write_text_only(tmp_path / "DIR")
    for name in ("runs", "scenes", "tasks"):
        (tmp_path / name).mkdir()
    (tmp_path / "runs" / "my-cobra").symlink_to(MINI)
    for name in ("scene.png", "scenes/000.png"):
        shutil.copy(MINI / "demo.png", tmp_path / name)
    written(tmp_path / "questions.jsonl", LINES)
    (tmp_path / "my.jsonl").write_text("".join((MINI / "heldout.jsonl").read_text().splitlines(True)[:10]))
    (tmp_path / "heldout").symlink_to(MINI / "heldout")
    (tmp_path / "budget.toml").write_text("[schemes.w4a16-g128]\nkld_mean = {max = 1e9}\n")
    written(tmp_path / "tasks" / "scenes.jsonl", SCENES)
    for name, text in BENCHMARKS.items():
        (tmp_path / name).write_text(text)
    for folder, names in IMAGES.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            shutil.copy(MINI / "demo.png", tmp_path / folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "tasks"))
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = our_arguments(command)
    assert calls, f"no command of ours and no reason why it is not run: {command}"
    for arguments in calls:
        extra = next((NEED[word] for word in arguments if word in NEED), None)
        if extra in ("eval", "lmms"):
            pytest.importorskip("lm_eval" if extra == "eval" else "lmms_eval", reason=f"the extra {extra} is not installed")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"How many objects are there?\n")))
        assert run_command(cobra_edge, arguments) == 0, command


def runnable(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.why_not() is None and block.language != "text"]


def marked(page: str) -> object:
    """Return a parameter; a page that calls a benchmark harness is marked `extras`."""
    words = {word for block in runnable(page) for command in block.commands() for word in command.split()}
    return pytest.param(page, marks=[pytest.mark.extras] if words & {"lm-eval", "lmms-eval"} and page != "README.md" else [])


@pytest.mark.parametrize("page", [marked(page) for page in pages() if runnable(page)])
def test_what_a_page_shows_works(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in sorted(runnable(page), key=lambda block: block.file is None):  # files first: commands use them
        if block.file is not None:
            (workspace / block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "__main__"})
        elif block.language in ("json", "jsonl"):
            assert [json.loads(line) for line in block.text.splitlines()]
        elif block.language in ("yaml", "yml"):
            assert yaml.safe_load(block.text)
        elif block.language not in ("ini", "toml"):
            assert block.commands(), f"{page}:{block.line}: nothing to run; say what it is: ```text"
            for command in block.commands():
                if block.why_not(command) is None:
                    run(command, monkeypatch)


@pytest.mark.parametrize("page", pages())
def test_every_command_and_option_exists(page: str) -> None:
    """Commands that are not run are checked too: stale commands and flags are found on any page."""
    commands = [command for block in blocks(page) for command in block.commands()] + inline_commands(page)
    for command in commands:
        for arguments in our_arguments(command):
            hold_against_the_command_line(arguments, command)


def hold_against_the_command_line(arguments: list[str], whole: str) -> None:
    context = click.Context(cobra_edge, info_name="cobra-edge")
    found: click.Command = cobra_edge
    while (
        isinstance(found, click.Group)
        and arguments
        and (found is not cobra_edge or arguments[0] not in ("--version", "--help"))
    ):
        _, below, arguments = found.resolve_command(context, list(arguments))
        assert below is not None, whole
        found, context = below, click.Context(below, parent=context)
    options = {name: param for param in found.params for name in (*param.opts, *param.secondary_opts)}
    for index, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name.startswith("--") and name != "--help":
            assert name in options, f"{whole}: there is no {name}"
            kind = options[name].type
            if isinstance(kind, click.Choice):
                value = value or arguments[index + 1]
                assert value in kind.choices, f"{whole}: {name} takes {kind.choices}"


@pytest.mark.parametrize("block", [block for block in ALL if block.reasons], ids=lambda block: f"{block.page}:{block.line}")
def test_a_reason_is_one_and_is_needed(block: Block) -> None:
    for text, reason in block.reasons.items():
        assert len(reason) > 10
        assert text in block.text, "no line contains what is not run"
    if block.language == "python":
        ast.parse(block.text)


def test_make_targets_extras_and_scripts_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    for block in ALL:
        for command in block.commands():
            for target in re.findall(r"^make ([a-z0-9-]+)", command):
                assert target in targets, command
            for extras in re.findall(r"\.\[([a-z0-9,-]+)\]", command):
                assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(",")), command
            for file in re.findall(r"(?:^|[ =])((?:bench|export)/[\w./-]+)", command):
                assert (ROOT / file).exists(), command


def test_nothing_is_installed_from_an_index_that_does_not_have_it() -> None:
    for page in pages():
        named = re.search(r"pip install 'cobra-edge(?!\[[a-z,]+\] @ )", (ROOT / page).read_text())
        assert not named, f"{page}: pip install '.[EXTRA]' in a copy of the source, or '... @ URL'"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- not run: a reason -->\n\nprose\n", "before no block"),
        ("<!-- not run because -->\n```\nx\n```\n", "not a mark"),
        ("```\nx\n", "at its end"),
    ],
)
def test_a_mark_that_means_nothing_is_refused(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr("tests.project.doc_blocks.ROOT", tmp_path)
    with pytest.raises(ValueError, match=says):
        blocks("page.md")


def test_a_stale_flag_or_command_is_found() -> None:
    for command in ("cobra-edge run B --picture x", "python -m cobra_edge.expotr", "cobra-edge run B --device tpu"):
        with pytest.raises((AssertionError, click.UsageError)):
            hold_against_the_command_line(our_arguments(command)[0], command)
    hold_against_the_command_line(our_arguments("env A=1 cobra-edge run B --device cpu | head")[0], "fine")
