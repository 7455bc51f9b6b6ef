"""lm-eval on a bundle: its results are those of the same lines computed directly."""

from __future__ import annotations

import functools
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cobra_edge.decode.sampling import GREEDY, Sampling
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.inference.session import Session, load
from cobra_edge.regress.adapters.generation_args import GenerationArgs
from cobra_edge.regress.adapters.harness_command import harness
from cobra_edge.regress.adapters.lm_eval_command import lm_eval as command
from cobra_edge.regress.adapters.model_adapter import only_image
from cobra_edge.terminal.output import run_command

from ..tolerance import assert_close
from . import harness_case as case

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from cobra_edge.regress.adapters.lm_eval import CobraEdgeLM

pytestmark = pytest.mark.extras
TASK_CODE = """import datasets


def decoded(lines):
    return lines.cast_column("image", datasets.Image())
"""


@pytest.fixture(autouse=True)
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Read no index of lm-eval's own tasks, thousands of files, but in the test that looks for a name among them."""
    if "near_matches" not in request.node.name:
        own = functools.partial(TaskManager, include_defaults=False)
        monkeypatch.setattr("cobra_edge.regress.adapters.lm_eval.TaskManager", own)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wire = case.Wire()
    monkeypatch.setattr(socket.socket, "connect", lambda that, address: wire.connect(that, address))
    monkeypatch.setattr(socket, "getaddrinfo", wire.getaddrinfo)
    yield
    assert not wire.wanted


@pytest.fixture(scope="module")
def bundle(mini_bundle: Callable[..., Path]) -> Path:
    return mini_bundle("w4a16-g128")


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return load(bundle, device="cpu")


@pytest.fixture(scope="module")
def lm(bundle: Path) -> CobraEdgeLM:
    return CobraEdgeLM(bundle, device="cpu")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    directory = tmp_path / "tasks"
    directory.mkdir()
    case.write_lines(directory)
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": case.CHOICES}
    case.write_task(directory, "choice", {**choice, "metric_list": case.metric("acc")}, {})
    seen = {
        "output_type": "generate_until",
        "doc_to_text": "<image>{{question}}",
        "doc_to_image": ["image"],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": case.LIMIT},
        "metric_list": case.metric("exact_match"),
    }
    case.write_task(directory, "seen", seen, {"process_docs": "images.decoded"})
    (directory / "images.py").write_text(TASK_CODE)
    return directory


def ask(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("mini", 0, 1))


def seen(*images: Any) -> dict[str, Any]:
    return {"visual": list(images)}


def test_tasks_give_the_numbers_of_the_same_lines_asked_by_hand(
    bundle: Path, session: Session, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    arguments = [str(bundle), "--tasks", "mini_choice,mini_seen", "--include-path", str(tasks), "--device", "cpu"]
    assert run_command(command, [*arguments, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == report
    assert [f.name for f in tmp_path.iterdir() if "report" in f.name] == ["report.json"]
    by_hand = [text == line.answer for text, line in zip(case.answers(session), case.SEEN, strict=True)]
    assert 0 < sum(by_hand) < len(by_hand)  # a caption is cut short: not everything is right
    assert report["results"]["mini_seen"]["exact_match,none"] == pytest.approx(np.mean(by_hand))
    assert report["results"]["mini_choice"]["acc,none"] == pytest.approx(case.accuracy_of_choices(session))
    assert report["versions"] == {"mini_choice": 2.0, "mini_seen": 2.0}
    assert report["n-samples"]["mini_choice"] == {"original": len(case.YES_OR_NO), "effective": len(case.YES_OR_NO)}
    assert report["runtime"] == {"decoder": session.decoder.name, "vision": session.vision and session.vision.name}
    assert (report["prompts"], report["shortened_prompts"]) == ("zephyr", 0)


def test_a_table_names_each_measure_and_the_limit_counts(
    bundle: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(bundle), "--tasks", "mini_choice", "--include-path", str(tasks), "--device", "cpu", "--limit", "2"]
    assert run_command(command, arguments) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "mini_choice" in line)
    assert "acc" in row and row.rstrip(" │").endswith(" 2")


@pytest.mark.parametrize("with_image", [False, True])
def test_likelihoods_are_those_of_the_whole_line_read_at_once(lm: CobraEdgeLM, session: Session, with_image: bool) -> None:
    lines = case.SEEN[:6]
    requests, expected = [], []
    for line in lines:
        for answer in ("Yes", line.answer, line.answer + " " + case.SEEN[4].answer * 4):
            more = [seen(Image.open(case.image(line)))] if with_image else []
            requests.append(ask("loglikelihood", f"<image>{line.prompt}", f" {answer}", *more))
            expected.append(case.likelihood(session, line, answer, with_image))
    found = lm.loglikelihood(requests)
    assert_close(np.array([p for p, _ in found]), np.array([p for p, _ in expected]), "decoder")
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == ({False, True} if with_image else {greedy for _, greedy in expected})


def test_answers_longer_than_a_piece_are_read_on(lm: CobraEdgeLM, session: Session) -> None:
    line, answer = case.SEEN[0], " ".join([case.SEEN[4].answer] * 6)
    assert len(session.codec.encode(answer)) > 2 * 128
    found = lm.loglikelihood([ask("loglikelihood", line.prompt, answer)])
    assert_close(np.array(found[0][0]), np.array(case.likelihood(session, line, answer, False)[0]), "decoder")


def test_raw_prompts_are_split_as_lm_eval_splits_them(bundle: Path, session: Session) -> None:
    raw, prompt, answer = CobraEdgeLM(bundle, device="cpu", raw_prompts=True), "Is there a red circle? ", " Yes"
    whole = session.codec.encode(prompt + answer)
    before = session.codec.encode(prompt.rstrip())
    tokens = whole[len(before) :]
    expected = case.log_p(case.logits_of(session, before, tokens), tokens).sum()
    found = raw.loglikelihood([ask("loglikelihood", prompt, answer)])
    assert_close(np.array(found[0][0]), expected, "decoder")


def test_without_a_context_the_end_token_stands_in_front(lm: CobraEdgeLM, session: Session) -> None:
    tokens = session.codec.encode(" Yes")
    expected = case.log_p(case.logits_of(session, [session.codec.end_id], tokens), tokens).sum()
    found = lm.loglikelihood([ask("loglikelihood", "", " Yes"), ask("loglikelihood", "Anything?", "")])
    assert_close(np.array(found[0][0]), expected, "decoder")
    assert found[1] == (0.0, True)


def test_rolling_likelihood_starts_anew_in_each_window(
    lm: CobraEdgeLM, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = case.SEEN[4].answer
    tokens = session.codec.encode(text)
    whole = case.log_p(case.logits_of(session, [session.codec.end_id], tokens), tokens).sum()
    assert_close(np.array(lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])), np.array([whole]), "decoder")
    half = (len(tokens) + 1) // 2
    object.__setattr__(lm.model_adapter.session, "config", type("Config", (), {"max_length": half}))
    try:
        found = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    finally:
        object.__setattr__(lm.model_adapter.session, "config", session.config)
    second = tokens[half:]
    parts = case.log_p(case.logits_of(session, [session.codec.end_id], tokens[:half]), tokens[:half]).sum()
    parts += case.log_p(case.logits_of(session, tokens[half - 1 : half], second), second).sum()
    assert_close(np.array(found), np.array([parts]), "decoder")


def test_answers_are_those_of_the_session(lm: CobraEdgeLM, session: Session) -> None:
    options = {"until": ["\n"], "max_gen_toks": case.LIMIT}
    requests = [ask("generate_until", line.prompt, options, seen(Image.open(case.image(line)))) for line in case.SEEN]
    assert lm.generate_until(requests) == case.answers(session)
    sampled = {"do_sample": True, "temperature": 50.0, "max_gen_toks": case.LIMIT}
    found = lm.generate_until([ask("generate_until", "Is there a red circle?", sampled)] * 2)
    by_hand = [
        session.ask(None, "Is there a red circle?", max_new_tokens=case.LIMIT, sampling=Sampling(50.0, seed=seed)).read()
        for seed in (0, 1)
    ]
    assert found == by_hand and found[0] != found[1]


def test_an_answer_ends_before_the_first_stop(lm: CobraEdgeLM, session: Session) -> None:
    line = next(line for line in case.SEEN if line.task == "caption")
    full = session.ask(case.image(line), line.prompt, max_new_tokens=64).read()
    early, late = full.split()[2], full.split()[5]
    options = {"until": [late, "", early], "max_gen_toks": 64}
    (found,) = lm.generate_until([ask("generate_until", line.prompt, options, seen(Image.open(case.image(line))))])
    assert found == full[: min(full.index(early), full.index(late))] and found


def test_an_image_that_comes_again_is_looked_at_once(lm: CobraEdgeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    look = lm.model_adapter.session.look
    monkeypatch.setattr(lm.model_adapter.session, "look", lambda image: looked.append(image) or look(image))
    monkeypatch.setattr(lm.model_adapter, "_looked", type(lm.model_adapter._looked)())
    images = [np.full((9, 9, 3), shade, np.uint8) for shade in (10, 10, 200, 10)]
    lm.loglikelihood([ask("loglikelihood", "What?", "Yes", seen(Image.fromarray(p))) for p in images])
    assert len(looked) == 2
    many = [Image.new("RGB", (3, 3), (shade, 0, 0)) for shade in range(9)]
    lm.loglikelihood([ask("loglikelihood", "What?", "Yes", seen(p)) for p in [*many, many[1], many[0]]])
    assert len(looked) == 2 + 9 + 1  # eight are remembered: of the nine, the first is not


def test_a_prompt_too_long_loses_its_beginning_and_is_counted(lm: CobraEdgeLM, session: Session) -> None:
    before, prompt = lm.model_adapter.shortened, "blue star " * session.config.max_length
    (found,) = lm.loglikelihood([ask("loglikelihood", prompt, "Yes")])
    tokens, answer = session.codec.encode(session.template.first_turn(prompt)), session.codec.encode("Yes")
    kept = tokens[-(session.config.max_length + 1 - len(answer)) :]
    assert_close(np.array(found[0]), case.log_p(case.logits_of(session, kept, answer), answer).sum(), "decoder")
    assert lm.model_adapter.shortened == before + 1
    (text,) = lm.generate_until([ask("generate_until", prompt, {"max_gen_toks": 4})])
    assert len(session.codec.encode(text)) <= 1  # one position is left
    assert lm.model_adapter.shortened == before + 2


def test_lm_eval_knows_the_model_by_name(bundle: Path) -> None:
    opened = get_model("cobra-edge").create_from_arg_string(f"bundle={bundle},device=cpu,threads=1,raw_prompts=true")
    assert isinstance(opened, CobraEdgeLM) and opened.model_adapter.raw_prompts


def test_generation_options_of_the_harnesses_are_read() -> None:
    assert GenerationArgs.of({}) == GenerationArgs((), 256, GREEDY)
    assert GenerationArgs.of({"until": "\n", "max_new_tokens": 3}) == GenerationArgs(("\n",), 3, GREEDY)
    assert GenerationArgs.of({"do_sample": False, "temperature": 0.7, "num_beams": 1}).sampling == GREEDY
    assert GenerationArgs.of({"do_sample": True}).sampling == Sampling(1.0)
    assert GenerationArgs.of({"temperature": 0.5, "top_k": 4, "top_p": 0.9, "seed": 7}, 2).sampling == Sampling(0.5, 4, 0.9, 9)
    assert GenerationArgs.of({"temperature": 0.5, "top_p": None}).sampling == Sampling(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"until": [3]}, "until is"),
        ({"max_gen_toks": 0}, "limit is 0"),
        ({"do_sample": True, "temperature": "warm"}, "is not a number"),
        ({"do_sample": True, "top_p": 3}, "top-p is 3"),
    ],
)
def test_options_that_a_session_does_not_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerationArgs.of(options)


def test_two_images_are_refused(lm: CobraEdgeLM) -> None:
    two = seen(Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2)))
    with pytest.raises(InputError, match="task mini, document 0 has 2 images, the model accepts one"):
        lm.generate_until([ask("generate_until", "What?", {}, two)])


def test_what_is_no_image_is_refused(lm: CobraEdgeLM) -> None:
    with pytest.raises(InputError, match="a str instead of an image"):
        lm.generate_until([ask("generate_until", "What?", {}, seen("scene.png"))])
    assert only_image(None, "here") is None and only_image([], "here") is None


def test_sounds_are_refused(lm: CobraEdgeLM) -> None:
    with pytest.raises(InputError, match="contains audio"):
        lm.loglikelihood([ask("loglikelihood", "What?", "Yes", {"audio": [b""]})])


def test_a_rolling_likelihood_after_an_image_is_refused(lm: CobraEdgeLM) -> None:
    with pytest.raises(InputError, match="supports no image"):
        lm.loglikelihood_rolling([ask("loglikelihood_rolling", "Text.", seen(Image.new("RGB", (2, 2))))])


def test_a_text_only_bundle_refuses_images(tiny_bundle: Path) -> None:
    text_only = CobraEdgeLM(tiny_bundle, device="cpu")
    assert len(text_only.loglikelihood([ask("loglikelihood", "What?", "Yes")])) == 1
    with pytest.raises(InputError, match="text-only model"):
        text_only.loglikelihood([ask("loglikelihood", "What?", "Yes", seen(Image.new("RGB", (2, 2))))])


def test_an_empty_prompt_is_refused(lm: CobraEdgeLM, bundle: Path) -> None:
    for model in (lm, CobraEdgeLM(bundle, device="cpu", raw_prompts=True)):
        with pytest.raises(InputError, match="the prompt is empty"):
            model.generate_until([ask("generate_until", "<image>", {})])


def test_an_answer_longer_than_the_model_takes_is_refused(lm: CobraEdgeLM) -> None:
    with pytest.raises(InputError, match="the continuation alone fills the 1024 tokens"):
        lm.loglikelihood([ask("loglikelihood", "What?", "blue star " * 1024)])


def test_logits_that_are_not_finite_are_refused(lm: CobraEdgeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.model_adapter.session.decoder, "forward", lambda read, _state: np.full((len(read), 512), np.nan))
    with pytest.raises(InputError, match="not finite"):
        lm.loglikelihood([ask("loglikelihood", "What?", "A large red square")])


def test_batches_and_chat_templates_are_refused(lm: CobraEdgeLM, bundle: Path) -> None:
    with pytest.raises(InputError, match="batch-size is 8"):
        CobraEdgeLM(bundle, batch_size=8)
    with pytest.raises(InputError, match="leave apply_chat_template off"):
        lm.apply_chat_template([{"role": "user", "content": "What?"}])
    assert lm.tokenizer_name == "cobra-mini"


def test_an_unknown_task_is_refused_with_near_matches(bundle: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(bundle), "--include-path", str(tasks), "--device", "cpu", "--tasks"]
    assert run_command(command, [*arguments, "mini_sene"]) == 2
    assert "unknown task 'mini_sene'; did you mean 'mini_seen'" in " ".join(capsys.readouterr().err.split())


def test_no_task_is_refused(bundle: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command, [str(bundle), "--include-path", str(tasks), "--device", "cpu", "--tasks", ","]) == 2
    assert "names no task" in capsys.readouterr().err


def test_a_place_where_no_report_can_be_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, message in ((tmp_path / "none" / "a.json", "no such directory"), (tmp_path, "is a directory")):
        assert run_command(command, ["no-bundle", "--tasks", "mini", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


def test_data_that_cannot_be_had_is_the_machine_s_lack(bundle: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tasks / "choice.jsonl").unlink()
    assert run_command(command, [str(bundle), "--tasks", "mini_choice", "--include-path", str(tasks), "--device", "cpu"]) == 3
    assert "the data of a task is not available" in capsys.readouterr().err


def test_a_library_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cobra_edge.regress.adapters.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_command(command, ["no-bundle", "--tasks", "mini"]) == 3
    assert install_hint("eval") in " ".join(capsys.readouterr().err.split())


def test_what_a_task_needs_and_is_missing_is_named() -> None:
    with pytest.raises(MachineError, match="a task, or lm_eval, needs antlr4"), harness("lm_eval", "eval"):
        raise ModuleNotFoundError(name="antlr4")
