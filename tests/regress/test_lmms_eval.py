"""lmms-eval on a bundle: its results are those of the same lines computed directly.

A run of it changes filelock, ssl and loguru for the whole process, so each has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cobra_edge.environment.requirements import install_hint
from cobra_edge.inference.session import Session, load
from cobra_edge.regress.adapters.lmms_eval_command import lmms_eval as command
from cobra_edge.terminal.output import run_command

from ..tolerance import assert_close
from . import harness_case as case

pytest.importorskip("lmms_eval", reason="the extra `lmms` is not installed")

pytestmark = pytest.mark.extras

TASK_CODE = """import datasets


def decoded(lines):
    return lines.cast_column("image", datasets.Image())


def shown(line):
    return [line["image"]]
"""

# Runs the command without a network; the exit code is its own, or 99 where something wanted a network.
RUN = """import sys
from tests.regress.harness_case import Wire

wire = Wire()
wire.cut()
from cobra_edge.regress.adapters.lmms_eval_command import lmms_eval
from cobra_edge.terminal.output import run_command

code = run_command(lmms_eval, sys.argv[1:])
print(*wire.wanted, sep="\\n", file=sys.stderr)
sys.exit(99 if wire.wanted else code)
"""

# Asks the model that lmms-eval finds by its name as lmms-eval would, and prints what it answers or refuses.
CALL = """import json, sys
from tests.regress.harness_case import Wire, LIMIT, SEEN, image

wire = Wire()
wire.cut()
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image

from cobra_edge.errors import CobraEdgeError


metadata = {"task": "mini", "doc_id": 0, "repeats": 1}


def ask(kind, *arguments):
    return getattr(model, kind)([Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)])[0]


def refusal(ask, *arguments):
    try:
        return ask(*arguments)
    except CobraEdgeError as error:
        return str(error)


model = get_model("cobra-edge").create_from_arg_string(f"bundle={sys.argv[1]},device=cpu")
model.task_dict = {"mini": {"test": [{"image": str(image(line)), "answer": line.answer} for line in SEEN]}}
shown = lambda line: [Image.open(line["image"])]
twice = lambda line: [Image.open(line["image"])] * 2
place = 0, "mini", "test"
print(json.dumps({
    "likelihoods": [ask("loglikelihood", SEEN[i].prompt, SEEN[i].answer, shown, i, "mini", "test").text for i in range(5)],
    "by_function": ask("loglikelihood", SEEN[4].prompt, lambda line: line["answer"], shown, 4, "mini", "test").text,
    "no_image": ask("loglikelihood", SEEN[0].prompt, "Yes").text,
    "two": refusal(ask, "generate_until", "What?", {}, twice, *place),
    "rounds": refusal(ask, "generate_until_multi_round", "What?", {}, shown, None, *place),
    "batch": refusal(lambda: type(model)(sys.argv[1], batch_size=4)),
    "text_only": refusal(lambda: type(model)(sys.argv[2]).model_adapter.session.look(image(SEEN[0]))),
    "wanted": wire.wanted,
}))
"""


@pytest.fixture(scope="module")
def bundle(mini_bundle: Callable[..., Path]) -> Path:
    return mini_bundle("w4a16-g128")


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return load(bundle, device="cpu")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    directory = tmp_path / "tasks"
    directory.mkdir()
    case.write_lines(directory)
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": case.CHOICES}
    case.write_task(directory, "choice", {**choice, "metric_list": case.metric("acc")}, {})
    seen = {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "generation_kwargs": {"max_new_tokens": case.LIMIT},
        "metric_list": case.metric("exact_match"),
    }
    case.write_task(directory, "seen", seen, {"process_docs": "images.decoded", "doc_to_visual": "images.shown"})
    (directory / "images.py").write_text(TASK_CODE)
    return directory


def child(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=root, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)


def test_tasks_give_the_numbers_of_the_same_lines_asked_by_hand(
    bundle: Path, session: Session, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    arguments = [bundle, "--tasks", "mini_choice,mini_seen", "--include-path", tasks, "--device", "cpu", "--out", out, "--json"]
    done = child(RUN, *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert json.loads(out.read_text()) == report
    by_hand = [text == line.answer for text, line in zip(case.answers(session), case.SEEN, strict=True)]
    assert report["results"]["mini_seen"]["exact_match,none"] == pytest.approx(np.mean(by_hand))
    assert report["results"]["mini_choice"]["acc,none"] == pytest.approx(case.accuracy_of_choices(session))
    assert (report["harness"], report["versions"]) == ("lmms-eval", {"mini_choice": 2.0, "mini_seen": 2.0})
    assert report["n-samples"]["mini_choice"]["effective"] == len(case.YES_OR_NO)
    assert report["runtime"] == {"decoder": session.decoder.name, "vision": session.vision and session.vision.name}


def test_the_model_answers_as_the_session_does_and_refuses_what_it_cannot(
    bundle: Path, session: Session, tiny_bundle: Path
) -> None:
    done = child(CALL, bundle, tiny_bundle)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    expected = [case.likelihood(session, line, line.answer, seen=True) for line in case.SEEN[:5]]
    counts = [len(session.codec.encode(line.answer)) for line in case.SEEN[:5]]
    losses = [-p / n for (p, _), n in zip(expected, counts, strict=True)]
    assert_close(np.array([loss for loss, _ in found["likelihoods"]]), np.array(losses), "decoder")
    assert [greedy for _, greedy in found["likelihoods"]] == [greedy for _, greedy in expected]
    assert found["by_function"] == found["likelihoods"][4]
    assert_close(np.array(found["no_image"][0]), np.array(-case.likelihood(session, case.SEEN[0], "Yes", False)[0]), "decoder")
    assert found["two"].startswith("task mini, document 0 has 2 images")
    assert "multi-round tasks" in found["rounds"]
    assert "batch-size is 4" in found["batch"]
    assert "text-only model" in found["text_only"]
    assert not found["wanted"]


def test_an_unknown_task_is_refused_with_near_matches(bundle: Path, tasks: Path) -> None:
    done = child(RUN, bundle, "--tasks", "mini_sene", "--include-path", tasks, "--device", "cpu")
    assert done.returncode == 2, done.stderr
    assert "unknown task 'mini_sene'; did you mean 'mini_seen'" in " ".join(done.stderr.split())


def test_a_library_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cobra_edge.regress.adapters.lmms_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    assert run_command(command, ["no-bundle", "--tasks", "mini"]) == 3
    assert install_hint("lmms") in " ".join(capsys.readouterr().err.split())
