"""Answers of the float model: against greedy decoding of the whole model; groups, resuming, empty and cut answers."""

from dataclasses import replace

import pytest
import torch

from cobra_edge.decode.native_operations import best_operations
from cobra_edge.errors import InputError
from cobra_edge.inputs.text import PromptTemplate, TextCodec
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.model.mamba import Mamba
from cobra_edge.quantize import own_answers as module
from cobra_edge.quantize.calibration_data import EmbeddingCache, visual_embeddings
from cobra_edge.quantize.own_answers import Greedy, own_answers, with_own_answers
from cobra_edge.suite.line import Line
from cobra_edge.suite.line_set import LineSet

LIMIT = 30


@pytest.fixture(scope="module")
def mini():
    return open_checkpoint("mini")


@pytest.fixture(scope="module")
def cache(mini):
    return EmbeddingCache(mini)


@pytest.fixture(scope="module")
def asked():
    """Lines about three images, not in their order, and one about none."""
    of = ("calibration/007.png", "calibration/000.png", "calibration/003.png")
    known = [line for line in LineSet.embedded().lines if line.image in of]
    lines = [Line(line.prompt, task=line.task, image=line.image) for line in known[::2]]
    return replace(LineSet.embedded(), lines=[*lines[::-1], Line("What is the capital of France?")])


@pytest.fixture(scope="module")
def reference(mini, asked):
    """Tokens of greedy decoding by the whole model, one line after the other."""
    config = mini.config.mamba
    model = Mamba(config)
    tensors = {k: v.float() for k, v in mini.decoder.items()}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]})
    codec, template = TextCodec.open(mini.tokenizer_file(), config.vocab), PromptTemplate(mini.config.prompt_style)
    with torch.inference_mode():
        return [greedy(model, mini, codec, template, line, asked.directory) for line in asked.lines]


def greedy(model, mini, codec, template, line, directory):
    prompt = model.embed(torch.tensor([codec.encode(template.first_turn(line.prompt))]))
    seen = [] if line.image is None else [visual_embeddings(mini, [directory / line.image])[None]]
    logits, state = model(torch.cat([*seen, prompt], dim=1))
    found = []
    while len(found) < LIMIT and (token := int(logits[0, -1].argmax())) != codec.end_id:
        found.append(token)
        logits, state = model(model.embed(torch.tensor([[token]])), state)
    return found


def test_answers_are_those_of_greedy_decoding(mini, cache, asked, reference):
    assert own_answers(mini, asked, cache, Greedy(best_operations(), limit=LIMIT)) == reference
    lengths = [len(answer) for answer in reference]
    assert min(lengths) < 5 and max(lengths) > 10, "answers of different lengths, which end at different steps"


def test_an_interrupted_run_resumes_after_its_last_group(mini, cache, asked, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_STATE_BYTES", 1)  # each image is a group
    steps, kept = [], tmp_path / "answers.json"

    def stop(name, done, total):
        steps.append(name)
        assert done <= total
        if name.endswith("group 3 of 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own_answers(mini, asked, cache, Greedy(best_operations(), on_progress=stop, limit=LIMIT), kept)
    steps.clear()
    again = Greedy(best_operations(), on_progress=lambda name, *_: steps.append(name), limit=LIMIT)
    assert own_answers(mini, asked, cache, again, kept) == reference
    assert {step[-6:] for step in steps if "answers" in step} == {"3 of 4", "4 of 4"}


@pytest.mark.parametrize("content", [b"no JSON", b'{"identity": "of other inputs", "tokens": {"1": [5]}}'])
def test_answers_of_other_inputs_are_not_taken(mini, cache, asked, reference, tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    few = replace(asked, lines=asked.lines[:1])
    assert own_answers(mini, few, cache, Greedy(best_operations(), limit=LIMIT), tmp_path / "a.json") == reference[:1]


def test_given_answers_stay_and_cut_ones_are_counted(mini, cache, asked, reference, capfd):
    longest = max(range(len(reference)), key=lambda i: len(reference[i]))
    lines = replace(asked, lines=[Line("Why?", "Because.", "text"), asked.lines[longest]])
    found = with_own_answers(mini, lines, cache, Greedy(best_operations(), limit=4))
    codec = TextCodec.open(mini.tokenizer_file(), mini.config.mamba.vocab)
    assert [line.answer for line in found.lines] == ["Because.", codec.decode(reference[longest][:4]).strip()]
    assert "1 answers by the float model, 4 tokens, 1 cut at 4 tokens" in " ".join(capfd.readouterr().err.split())


def test_empty_answers_are_left_out_and_counted(mini, asked, capfd, monkeypatch):
    monkeypatch.setattr(module, "own_answers", lambda *_: [[], [40], []])
    found = with_own_answers(mini, replace(asked, lines=asked.lines[:3]), None, Greedy(best_operations()))
    assert [line.prompt for line in found.lines] == [asked.lines[1].prompt]
    assert "3 answers by the float model, 1 tokens, 2 of them empty and left out" in " ".join(capfd.readouterr().err.split())


def test_nothing_but_empty_answers_is_refused(mini, asked, monkeypatch):
    monkeypatch.setattr(module, "own_answers", lambda *_: [[], []])
    with pytest.raises(InputError, match="answers to all 2 lines are empty, it ends at once; give lines with answers"):
        with_own_answers(mini, replace(asked, lines=asked.lines[:2]), None, Greedy(best_operations()))


def test_logits_that_are_not_finite_are_refused(text_only, monkeypatch):
    checkpoint = open_checkpoint(str(text_only))
    monkeypatch.setattr(module.RMSNorm, "forward", lambda _self, x: x * float("nan"))
    lines = LineSet("l", [Line("How are you?")], text_only)
    with pytest.raises(InputError, match="logits that are not finite"):
        own_answers(checkpoint, lines, EmbeddingCache(checkpoint), Greedy(best_operations()))
