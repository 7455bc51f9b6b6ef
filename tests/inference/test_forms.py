"""Answers in a form: always of it, unless the limit cuts them; what is not supported is refused by name."""

import json
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cobra_edge
from cobra_edge.decode.sampling import Sampling, choose
from cobra_edge.errors import InputError, MachineError
from cobra_edge.inference import forms
from cobra_edge.inference.logprobs import token_logprobs
from cobra_edge.inputs.text import TextCodec
from cobra_edge.run import command
from cobra_edge.terminal.output import run_command

from ..conftest import MINI

VOCAB = 512
OBJECT = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "star"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "colors": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["shape", "count", "colors"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def session(mini_bundle):
    return cobra_edge.load(mini_bundle("w4a16-g128"), device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    codec = TextCodec.open(MINI / "tokenizer.json", VOCAB)
    return codec, forms.FormTokenizer(MINI / "tokenizer.json", VOCAB, codec.end_id)


def babbled(tokenizer, form, seed, limit=400):
    """Return the text of an answer whose logits are noise, and whether it ended."""
    codec, masks = tokenizer
    mask, rng, tokens = masks.mask(form), np.random.default_rng(seed), []
    for _ in range(limit):
        token = choose(rng.standard_normal(VOCAB).astype(np.float32), Sampling(1.0), rng.random(), mask.allowed())
        if token == codec.end_id:
            return codec.decode(tokens), True
        mask.accept(token)
        tokens.append(token)
    return codec.decode(tokens), False


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_whatever_the_model_says_the_json_fits_its_schema(tokenizer, seed):
    text, ended = babbled(tokenizer, forms.json_schema(OBJECT), seed)
    assert ended
    jsonschema.validate(json.loads(text), OBJECT)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_whatever_the_model_says_the_expression_matches(tokenizer, seed):
    text, ended = babbled(tokenizer, forms.regex("(red|blue) (circle|star)s? [0-9]{1,3}"), seed)
    assert ended and re.fullmatch("(red|blue) (circle|star)s? [0-9]{1,3}", text)


@pytest.mark.parametrize("choices", [["Yes", "No"], ['a "quoted" one', "back\\slash", "two\nlines", "ümlaut"], ["one"]])
def test_a_choice_is_one_of_those_given(tokenizer, choices):
    assert {babbled(tokenizer, forms.one_of(choices), seed)[0] for seed in range(60)} == set(choices)


def test_a_control_token_is_never_part_of_a_form(tokenizer):
    codec, masks = tokenizer
    control = [codec.tokenizer.token_to_id(name) for name in ("<|user|>", "<|assistant|>", "<|padding|>")]
    allowed = masks.mask(forms.regex("(.|\n)*")).allowed()
    assert not allowed[control].any() and allowed[codec.end_id]


def test_an_answer_of_the_model_has_the_form(session):
    answer = session.ask(MINI / "demo.png", "What is in the image?", form=forms.json_schema(OBJECT), max_new_tokens=200)
    text = answer.read()
    jsonschema.validate(json.loads(text), OBJECT)
    assert answer.finish == "end"


def test_a_form_changes_nothing_about_an_answer_that_has_it(session):
    free = session.ask(MINI / "demo.png", "Is there a red circle?").read()
    assert session.ask(MINI / "demo.png", "Is there a red circle?", form=forms.regex("(.|\n)*")).read() == free
    assert free in ("Yes", "No")
    assert session.ask(MINI / "demo.png", "Is there a red circle?", form=forms.one_of(["Yes", "No"])).read() == free


def test_an_answer_that_the_limit_cuts_says_so(session):
    answer = session.ask(MINI / "demo.png", "What is in the image?", form=forms.json_schema(OBJECT), max_new_tokens=3)
    answer.read()
    assert answer.finish == "length"


def test_log_probabilities_are_those_of_the_logits(session):
    answer = session.ask(MINI / "demo.png", "What is in the image?", top_logprobs=5)
    answer.read()
    assert [found.chosen.token for found in answer.logprobs] == answer.tokens
    state = session.look(MINI / "demo.png")
    tokens = session.codec.encode(session.template.first_turn("What is in the image?"))
    logits = session.decoder.prefill(session.decoder.embed(tokens), state).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    first = answer.logprobs[0]
    assert first.top[0] == first.chosen  # greedy
    assert [found.token for found in first.top] == list(np.argsort(-log_probs)[:5])
    assert [found.logprob for found in first.top] == pytest.approx(sorted(log_probs)[:-6:-1], abs=1e-5)


@pytest.mark.parametrize("top", [0, 1, 4])
def test_the_most_probable_tokens_come_in_order(top):
    found = token_logprobs(np.array([0.0, 2.0, 1.0, 2.0], np.float32), 0, top)
    assert [each.token for each in found.top] == [1, 3, 2, 0][:top]
    assert sum(np.exp(each.logprob) for each in token_logprobs(np.zeros(4, np.float32), 0, 4).top) == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: forms.json_schema("{"), "JSON schema: not JSON"),
        (lambda: forms.json_schema("[1]"), "JSON schema: is a list, expected an object"),
        (lambda: forms.json_schema({"not": {"type": "string"}}), 'JSON schema: not supported: .*"not"'),
        (lambda: forms.json_schema({"type": "strin"}), "JSON schema: not supported: "),
        (lambda: forms.json_schema({"$ref": "https://host.example/a.json"}), "JSON schema: not supported: "),
        (lambda: forms.json_schema({"enum": ["a" * 70_000]}), "at most 65536 are taken"),
        (lambda: forms.json_schema("[" * 100_000), "JSON schema: not JSON"),
        (lambda: forms.regex("("), "regular expression: not supported: "),
        (lambda: forms.regex(""), "regular expression: 0 characters, expected 1 to 4096"),
        (lambda: forms.regex("a" * 5000), "regular expression: 5000 characters, expected 1 to 4096"),
        (lambda: forms.one_of([]), "got 0 choices, expected 1 to 256"),
        (lambda: forms.one_of(["a", ""]), "choice 2 of 2 is empty"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_schema_that_is_nested_without_end_is_refused():
    schema = {}
    for _ in range(100):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InputError, match="nested more than 64 deep"):
        forms.json_schema(schema)


def test_an_expression_that_explodes_is_an_error_and_not_a_hang(tokenizer):
    try:
        babbled(tokenizer, forms.regex("(a|b|c)*x(a|b|c|x){500}(red|blue){500}"), 0, 40)
    except InputError as error:
        assert str(error).startswith("regular expression: ")


def test_without_the_library_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        MachineError, match=r"answers in a given form need llguidance; install it with: pip install .*structured"
    ):
        forms.json_object()


def test_the_command_answers_in_a_form(mini_bundle, tmp_path, capsys):
    bundle, schema = str(mini_bundle("w4a16-g128")), tmp_path / "schema.json"
    schema.write_bytes(b"\xef\xbb\xbf" + json.dumps(OBJECT).encode())
    arguments = [bundle, "--image", str(MINI / "demo.png"), "--prompt", "What is in the image?"]
    assert run_command(command, [*arguments, "--json-schema", str(schema)]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), OBJECT)
    assert run_command(command, [*arguments, "--regex", "[0-9]{2} stars", "--json"]) == 0
    assert re.fullmatch("[0-9]{2} stars", json.loads(capsys.readouterr().out)["text"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--json-schema", "missing.json"], "missing.json: cannot be read"),
        (["--regex", "a", "--choices", "Yes,No"], "--regex and --choices: an answer has one form; give one of them"),
        (["--regex", "("], "regular expression: not supported"),
    ],
)
def test_the_command_refuses_a_form_before_it_opens_a_bundle(more, message, capsys):
    assert run_command(command, ["no-bundle", "--prompt", "What?", *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
