"""Closed questions: probabilities are those of whole answers, common beginnings are read once, and what is refused."""

import json

import numpy as np
import pytest

import cobra_edge
from cobra_edge.cli import command
from cobra_edge.errors import InputError
from cobra_edge.inference.choices import Choice, Choices, choose, tokenized_choices
from cobra_edge.terminal.output import run_command

from ..conftest import MINI
from ..tolerance import assert_close

IMAGE = MINI / "demo.png"
QUESTION = "What is in the image?"
TEXTS = ["a red circle", "a red square", "a red", "a blue circle at the left", "Yes"]


@pytest.fixture(scope="module", params=["native", "numpy"])
def session(tiny_bundle, request):
    return cobra_edge.load(tiny_bundle, kernels=request.param)


def by_teacher_forcing(session, prompt, text):
    """Return the log probability of an answer from logits of a fresh prefill for each of its tokens."""
    tokens = session.codec.answer(text)
    read, total = session.codec.encode(session.template.first_turn(prompt)), 0.0
    for token in tokens:
        logits = session.prefill(read, session.decoder.new_state()).astype(np.float64)
        total += logits[token] - np.logaddexp.reduce(logits)
        read = [*read, token]
    return total


def test_probabilities_are_those_of_whole_answers(session):
    found = session.choose(None, QUESTION, TEXTS)
    expected = np.array([by_teacher_forcing(session, QUESTION, text) for text in TEXTS], np.float32)
    got = np.array([c.log_probability for c in found.choices], np.float32)
    assert_close(got, expected, "decoder")
    assert [c.text for c in found.choices] == TEXTS and sum(c.probability for c in found.choices) == pytest.approx(1)
    logs = np.array([c.log_probability for c in found.choices])
    assert np.allclose([c.probability for c in found.choices], np.exp(logs - np.logaddexp.reduce(logs)))
    assert found.best.text == TEXTS[int(logs.argmax())]


def test_by_length_the_mean_over_tokens_is_compared(session):
    whole, mean = (session.choose(None, QUESTION, TEXTS, normalization=n) for n in ("none", "length"))
    assert [c.log_probability for c in whole.choices] == [c.log_probability for c in mean.choices]
    means = np.array([c.log_probability / c.tokens for c in mean.choices])
    assert np.allclose([c.probability for c in mean.choices], np.exp(means - np.logaddexp.reduce(means)))


def test_common_beginnings_are_read_once_and_the_state_is_copied(session, monkeypatch):
    sequences = tokenized_choices(TEXTS, session.codec)
    read = {tuple(s[:length]) for s in sequences for length in range(1, len(s))}
    steps, real = [], session.decoder.step
    monkeypatch.setattr(session.decoder, "step", lambda token, state: steps.append(token) or real(token, state))
    state = session.decoder.new_state()
    session.prefill([1, 2, 3], state)
    kept = state.copy()
    session.choose(state, QUESTION, TEXTS)
    assert len(steps) == len(read) < sum(len(s) - 1 for s in sequences)
    assert np.array_equal(kept.ssm, state.ssm) and np.array_equal(kept.conv, state.conv) and kept.n_tokens == state.n_tokens


def test_a_conversation_can_be_asked(session):
    answer = session.ask(None, QUESTION, max_new_tokens=3)
    answer.read()
    assert session.choose(answer, "And now?", ["Yes", "No"]).best.text in ("Yes", "No")


def test_the_model_that_sees_agrees_with_its_own_answer(mini_bundle):
    session = cobra_edge.load(mini_bundle("w4a16-g128"))
    state = session.look(IMAGE)
    for question, texts in (("Is there a red circle?", ["Yes", "No"]), ("How many objects are there?", list("123456"))):
        found = session.choose(state, question, texts)
        assert found.best.text == session.ask(state, question).read() and found.best.probability > 0.5


class TestRefusals:
    @pytest.mark.parametrize(
        ("texts", "told"),
        [
            ([], "got 0 choices, expected 2 to 256"),
            (["Yes"], "got 1 choices, expected 2 to 256"),
            ([str(n) for n in range(257)], "got 257 choices"),
            (["Yes", " "], "choice 2 of 2 is empty"),
            (["Yes", "No", " Yes "], "the choices 'Yes' and ' Yes ' are the same to the model"),
            (["<image>Yes", "Yes"], "are the same to the model"),
        ],
    )
    def test_choices_that_cannot_be_told_apart(self, session, texts, told):
        with pytest.raises(InputError, match=told):
            session.choose(None, QUESTION, texts)

    def test_a_choice_that_does_not_fit(self, session):
        state = session.decoder.new_state()
        state.n_tokens = session.config.max_length - 30
        with pytest.raises(InputError, match="a choice is .* tokens, the model takes .* after this prompt"):
            session.choose(state, "Is it?", ["Yes", "No " * 40])

    def test_logits_that_are_not_finite(self, session):
        logits = np.full(session.config.mamba.vocab, np.nan, np.float32)
        with pytest.raises(InputError, match="logits that are not finite"):
            choose(session.decoder, logits, session.decoder.new_state(), ["a", "b"], [[1], [2]])


def test_a_choice_that_is_the_beginning_of_another_one(session):
    """Its end is one more branch, of probability its own."""
    found = session.choose(None, QUESTION, ["a red", "a red circle"])
    assert all(c.log_probability < 0 for c in found.choices) and found.choices[0].tokens < found.choices[1].tokens


def test_unsure():
    found = Choices((Choice("Yes", 0.6, -1.0, 2), Choice("No", 0.4, -1.4, 2)), "none")
    assert found.sure(0.6) is found.best and found.sure(0.61) is None and found.best.text == "Yes"
    assert Choices((Choice("a", 0.5, -1.0, 2), Choice("b", 0.5, -1.0, 2)), "none").best.text == "a"


class TestCommand:
    def test_the_answer_is_printed_and_its_probability_told(self, tiny_bundle, capsys):
        assert run_command(command, ["run", str(tiny_bundle), "--prompt", QUESTION, "--choices", "Yes, No"]) == 0
        captured = capsys.readouterr()
        assert captured.out in ("Yes\n", "No\n") and captured.err.count("%") == 2

    def test_json(self, tiny_bundle, capsys):
        arguments = ["run", str(tiny_bundle), "--prompt", QUESTION, "--choices", "Yes,No", "--json", "--choice-score", "length"]
        assert run_command(command, arguments) == 0
        found = json.loads(capsys.readouterr().out)
        assert [c["text"] for c in found["choices"]] == ["Yes", "No"] and found["normalization"] == "length"
        assert found["text"] == max(found["choices"], key=lambda c: c["probability"])["text"] and found["image"] is None

    def test_unsure(self, tiny_bundle, capsys):
        asked = ["run", str(tiny_bundle), "--prompt", QUESTION, "--choices", "Yes,No", "--unsure-below", "1"]
        assert run_command(command, asked) == 0 and capsys.readouterr().out == "unsure\n"
        assert run_command(command, [*asked, "--json"]) == 0 and json.loads(capsys.readouterr().out)["text"] is None

    def test_a_threshold_without_choices(self, tiny_bundle, capsys):
        assert run_command(command, ["run", str(tiny_bundle), "--prompt", QUESTION, "--unsure-below", "0.5"]) == 2
        assert "--unsure-below is about --choices" in " ".join(capsys.readouterr().err.split())
