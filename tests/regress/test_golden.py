"""golden.safetensors: round trip, and refusals of what does not fit the model."""

import re

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cobra_edge.bundle.reader import GOLDEN, PROMPT, TOKENIZER, Bundle
from cobra_edge.errors import BundleError
from cobra_edge.regress.golden import read_golden, write_golden
from cobra_edge.regress.predictions import Prediction
from cobra_edge.regress.state_sketch import SKETCH_SIZE
from cobra_edge.regress.top_tokens import TopTokens
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.suite.tokenized import tokenized_suite

from .regress_lines import random_log_probs


def made(whole, directory, lines):
    """Return a bundle of text files and synthetic golden lines, its suite, predictions and embeddings."""
    directory.mkdir()
    for name in (TOKENIZER, PROMPT):
        (directory / name).write_bytes(whole.path(name).read_bytes())
    bundle, config = Bundle(directory, whole.manifest), whole.manifest.model
    codec, template = bundle.text()
    numbered = list(enumerate(lines, 1))
    sees = config.vision is not None
    suite = tokenized_suite("heldout", numbered, HELDOUT.parent.joinpath, codec, template, sees=sees, skipped={})
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((len(suite.images), config.n_visual_tokens, config.mamba.d_model)).astype(np.float32)
    predictions = []
    for tokenized in suite.lines:
        targets = np.array(tokenized.tokens[1:])
        top = TopTokens.of(random_log_probs(len(targets), config.mamba.vocab, 5.0, tokenized.number), targets)
        state = rng.standard_normal((config.mamba.n_layer, SKETCH_SIZE)).astype(np.float32)
        reply = tuple(tokenized.answer[: tokenized.number - 1])  # none at all of the first
        predictions.append(Prediction(top, state, reply, None if tokenized.image is None else embeddings[tokenized.image]))
    write_golden(directory / GOLDEN, suite, predictions, embeddings)
    return bundle, suite, predictions


@pytest.fixture(scope="module")
def mini(mini_bundle):
    return Bundle.open(mini_bundle("w4a16-g128"))


LINES = read_suite(HELDOUT)
SEEN = [LINES[0], LINES[1], LINES[40], Line("Is this text?", "Yes", "text", answers=("Yes",) * 4, metric="vqa", id="7")]


@pytest.fixture
def golden(mini, tmp_path):
    return made(mini, tmp_path / "golden", SEEN)[0]


def test_what_is_written_is_read(mini, tmp_path):
    bundle, suite, predictions = made(mini, tmp_path / "golden", SEEN)
    found = read_golden(bundle)
    assert [a.line for a in found.suite.lines] == SEEN and found.suite.images == suite.images == [
        SEEN[0].image,
        SEEN[2].image,
    ]
    for index in range(2):
        assert found.suite.load(index) == suite.load(index).read_bytes()
    for a, b, c, d in zip(found.suite.lines, suite.lines, found.predictions, predictions, strict=True):
        assert (a.number, a.prompt, a.answer, a.image) == (b.number, b.prompt, b.answer, b.image)
        assert np.array_equal(c.state, d.state) and c.reply == d.reply
        assert (c.embeddings is None) == (a.image is None) and (
            c.embeddings is None or np.array_equal(c.embeddings, d.embeddings)
        )
        for of in ("offsets", "ids", "log_probs", "tails"):
            assert np.array_equal(getattr(c.log_probs, of), getattr(d.log_probs, of)), of
    # What makes two lines the same is the image's content, not where it lies.
    assert [found.suite.key(a) for a in found.suite.lines] == [suite.key(a) for a in suite.lines]
    assert found.suite.sha256() == suite.sha256()


def test_what_is_written_is_read_without_images(tiny_bundle, tmp_path):
    bundle, suite, predictions = made(Bundle.open(tiny_bundle), tmp_path / "golden", [*SEEN[:2], LINES[90]])
    found = read_golden(bundle)
    assert found.suite.images == [] and [a.image for a in found.suite.lines] == [None] * 3
    assert [r.reply for r in found.predictions] == [r.reply for r in predictions]
    assert found.suite.sha256() == suite.sha256()


def swap(name, change):
    """Return a change of one array, by a function of a copy of it."""

    def apply(tensors):
        tensors[name] = np.ascontiguousarray(change(tensors[name].copy()))

    return apply


def put(name, at, value):
    def change(array):
        array[at] = value
        return array

    return swap(name, change)


def lines_become(change):
    """Return a change of the lines, by a function of their bytes."""
    return swap("lines", lambda a: np.frombuffer(change(a.tobytes()), np.uint8))


ARRAYS = ["lines", "pictures", "picture_offsets", "embeddings", "kept_offsets", "kept_ids", "kept_log_probs", "tails", "states",
          "replies", "reply_offsets"]  # fmt: skip
FIRST, THIRD = (str(line.image).encode() for line in (SEEN[0], SEEN[2]))
HIGHEST = np.iinfo(np.int64).max
FORGERIES = {
    "a stray tensor": (lambda t: t.update(stray=np.zeros(1, np.float32)), "stray: missing, unexpected"),
    "nothing but one": (lambda t: t.clear() or t.update(stray=np.zeros(1, np.float32)), ": missing, unexpected"),
    "lines that are not JSON": (lines_become(lambda b: b"{" + b), "does not fit the model"),
    "lines that are not text": (lines_become(lambda b: b.replace(b"Is", b"\xff\xfe")), "does not fit the model"),
    "no lines": (lines_become(lambda b: b""), "does not fit the model"),
    "a line too few": (lines_become(lambda b: b.rpartition(b"\n")[0]), "states"),
    "a line too many": (lines_become(lambda b: b + b"\n" + b.rpartition(b"\n")[2]), "states"),
    "a field that no line has": (lines_become(lambda b: b.replace(b'"prompt"', b'"prmpt"', 1)), "does not fit the model"),
    "another question": (lines_become(lambda b: b.replace(b"Is there a", b"Is", 1)), "positions"),
    "an empty question": (lines_become(lambda b: b.replace(b"Is this text?", b" ")), "line 4: prompt is empty"),
    "an unknown metric": (lines_become(lambda b: b.replace(b'"vqa"', b'"vqaa"')), "line 4: metric 'vqaa' is unknown"),
    "an image that nobody names": (lines_become(lambda b: b.replace(THIRD, FIRST)), "2 images, but the lines refer to 1"),
    "images that overlap": (put("picture_offsets", 1, -1), "offsets"),
    "images that end early": (put("picture_offsets", 2, 5), "offsets"),
    "images that begin late": (put("picture_offsets", 0, 5), "offsets"),
    "no image's place": (swap("picture_offsets", lambda a: a[:0]), "offsets"),
    "an image less": (swap("picture_offsets", lambda a: a[[0, 2]]), "1 images, but the lines refer to 2"),
    "embeddings of one image": (swap("embeddings", lambda a: a[:1]), r"embeddings \(1, 64, 256\)"),
    "embeddings of another size": (swap("embeddings", lambda a: a[:, :, :8]), r"embeddings \(2, 64, 8\)"),
    "embeddings that are not finite": (put("embeddings", (1, 2, 3), np.nan), "expected finite"),
    "states of one layer": (swap("states", lambda a: a[:, :1]), "states"),
    "states of another sketch": (swap("states", lambda a: a[:, :, :8]), "states"),
    "states that are not finite": (put("states", (0, 0, 0), np.inf), "states"),
    "replies to fewer lines": (swap("reply_offsets", lambda a: np.delete(a, 1)), "3 replies to 4 lines"),
    "replies that overlap": (put("reply_offsets", 1, 3), "offsets"),
    "a reply of unknown tokens": (put("replies", 0, 512), "replies contains tokens"),
    "a reply of negative tokens": (put("replies", 0, -1), "replies contains tokens"),
    "a distribution less": (swap("kept_offsets", lambda a: np.delete(a, 1)), "distributions"),
    "a distribution of nothing": (put("kept_offsets", 1, 0), "distributions"),
    "distributions that overlap": (put("kept_offsets", 2, 1), "distributions"),
    "distributions that begin late": (put("kept_offsets", 0, 1), "distributions"),
    "distributions that end early": (put("kept_offsets", -1, 9), "distributions"),
    "differences that wrap around": (put("kept_offsets", slice(1, 3), [HIGHEST, -2]), "distributions"),
    "no distribution": (swap("kept_offsets", lambda a: a[:0]), "distributions"),
    "an unknown token": (put("kept_ids", 3, 512), "kept_ids contains tokens"),
    "a negative token": (put("kept_ids", 3, -1), "kept_ids contains tokens"),
    "a log-probability less": (swap("kept_log_probs", lambda a: a[:-1]), "not logarithms"),
    "a probability over one": (put("kept_log_probs", 0, 0.1), "not logarithms"),
    "a probability of zero": (put("kept_log_probs", 0, -np.inf), "not logarithms"),
    "a probability that is none": (put("kept_log_probs", 0, np.nan), "not logarithms"),
    "a tail less": (swap("tails", lambda a: a[:-1]), "distributions"),
    "a negative tail": (put("tails", 0, -1e-3), "tails"),
    "a tail over one": (put("tails", 0, 1.5), "tails"),
    "a tail that is none": (put("tails", 0, np.nan), "tails"),
}  # fmt: skip


def forged(bundle, change):
    tensors = load_file(bundle.path(GOLDEN))
    change(tensors)
    save_file(tensors, bundle.path(GOLDEN))


def refusal(bundle):
    with pytest.raises(BundleError) as caught:
        read_golden(bundle)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(GOLDEN) and said.endswith("export the bundle again")
    return said


@pytest.mark.parametrize("name", FORGERIES)
def test_what_does_not_fit_is_refused(golden, name):
    change, says = FORGERIES[name]
    forged(golden, change)
    assert re.search(says, refusal(golden))


@pytest.mark.parametrize("name", ARRAYS)
def test_every_array_is_needed_in_its_own_form(golden, name):
    whole = golden.path(GOLDEN).read_bytes()
    for change in (lambda a: a.astype(np.float64), lambda a: a[None], lambda a: a.astype(np.uint16)):
        golden.path(GOLDEN).write_bytes(whole)
        forged(golden, swap(name, change))
        assert f"{name}: missing, unexpected or of the wrong type" in refusal(golden)
    golden.path(GOLDEN).write_bytes(whole)
    forged(golden, lambda tensors: tensors.pop(name))
    assert f"{name}: missing, unexpected or of the wrong type" in refusal(golden)


def test_a_right_token_that_was_not_kept_is_refused(golden):
    def lose(tensors):
        first, end = tensors["kept_offsets"][:2]
        tokenized = read_golden(golden).suite.lines[0]
        at = first + np.flatnonzero(tensors["kept_ids"][first:end] == tokenized.tokens[1])[0]
        tensors["kept_ids"][at] = next(i for i in range(512) if i not in tensors["kept_ids"][first:end])

    forged(golden, lose)
    assert "a target is not among the kept tokens" in refusal(golden)


def test_a_right_token_that_was_kept_twice_is_refused(golden):
    def double(tensors):
        first, end = tensors["kept_offsets"][:2]
        right = read_golden(golden).suite.lines[0].tokens[1]
        other = first + np.flatnonzero(tensors["kept_ids"][first:end] != right)[0]
        tensors["kept_ids"][other] = right

    forged(golden, double)
    assert "a target is not among the kept tokens" in refusal(golden)


def test_lines_of_another_tokenizer_are_refused(golden, mini):
    """The tokens are not in the file: they are made anew, and everything has to fit them."""
    tokenizer = msgspec.json.decode(golden.path(TOKENIZER).read_bytes())
    merges = tokenizer["model"]["merges"]
    assert len(merges) > 50
    tokenizer["model"]["merges"] = merges[:20]
    golden.path(TOKENIZER).write_bytes(msgspec.json.encode(tokenizer))
    assert "positions" in refusal(golden)
