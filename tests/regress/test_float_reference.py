"""Predictions of the float model, compared with plain torch, the runtime that ships, and greedy decoding token by token."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.torch_reference import TorchDecoder
from cobra_edge.errors import InputError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.session import Session
from cobra_edge.inputs.text import TextCodec
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.model.cobra import load_vision
from cobra_edge.quantize.calibration_data import visual_embeddings
from cobra_edge.regress import float_reference
from cobra_edge.regress.float_reference import batches, float_predictions, narrowed
from cobra_edge.regress.metrics import divergence, log_softmax
from cobra_edge.regress.predictions import predictions
from cobra_edge.regress.state_sketch import state_sketch
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.suite.tokenized import TokenizedLine, reply_limit, tokenized_suite

from ..conftest import write_text_only
from ..tolerance import assert_close, distance


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a text-only checkpoint of whole float16 numbers, and its fp16 bundle: the same model."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("tiny16")
    source = write_text_only(root / "mamba-tiny")
    tensors = load_file(source / "model.safetensors")
    save_file({name: value.half().float() for name, value in tensors.items()}, source / "model.safetensors")
    made = export_bundle(str(source), target_named("cpu"), root / "bundle", scheme="fp16", golden_lines=16)
    return open_checkpoint(str(source)), Bundle.open(made.directory)


@pytest.fixture(scope="module")
def mini(mini_bundle):
    return open_checkpoint("mini"), Bundle.open(mini_bundle("fp16"))


def suite_of(bundle, lines):
    codec, template = bundle.text()
    sees = bundle.manifest.model.vision is not None
    return tokenized_suite("s", list(enumerate(lines, 1)), HELDOUT.parent.joinpath, codec, template, sees=sees, skipped={})


@pytest.fixture(scope="module")
def tokenized(mini):
    """Return lines about images, about none, two of an image, that image again after another, and a wrong answer."""
    lines = read_suite(HELDOUT)
    first, other = lines[0].image, lines[30].image
    chosen = [lines[0], lines[1], lines[30], msgspec.structs.replace(lines[2], answer="No, it is something else"), lines[3]]
    chosen.append(Line("Is there a circle?", "Yes", "text"))
    chosen += [lines[31], lines[4]]
    assert first != other and chosen[-1].image == first
    return suite_of(mini[1], chosen)


@pytest.fixture(scope="module")
def look(mini, tokenized):
    """Return what the float model sees, as `float_predictions` asks for it."""
    model = load_vision(mini[0])

    def see(images):
        found = visual_embeddings(mini[0], [tokenized.load(p) for p in images], model=model)
        return list(found.numpy().reshape(len(images), -1, found.shape[-1]))

    return see


def plain_reading(decoder, line, embeddings, end):
    """Return logits, sketch and greedy answer of a line, read from the start, token by token where it is the answer."""
    visual = [] if embeddings is None else [embeddings]
    state = decoder.new_state()
    logits = decoder.forward(np.concatenate([*visual, decoder.embed(line.tokens[:-1])]), state)[-(len(line.tokens) - 1) :]
    free, reply = decoder.new_state(), []
    last = decoder.forward(np.concatenate([*visual, decoder.embed(list(line.prompt))]), free)[-1]
    while len(reply) < reply_limit(line) and int(last.argmax()) != end:
        reply.append(int(last.argmax()))
        last = decoder.forward(decoder.embed(reply[-1:]), free)[-1]
    return logits, state_sketch(state.ssm), tuple(reply)


def assert_same(prediction, line, embeddings, decoder, end, rounded="float32"):
    logits, state, reply = plain_reading(decoder, line, embeddings, end)
    assert prediction.log_probs.shape == logits.shape == (len(line.tokens) - 1, decoder.config.vocab)
    assert_close(prediction.log_probs, log_softmax(logits), "decoder", rounded)
    assert_close(prediction.state, state, "decoder", rounded)
    assert prediction.reply == reply


def read_tiny(tiny, lines, **options):
    return list(float_predictions(tiny[0], lines, lambda images: [], **options))


@pytest.mark.parametrize("at_once", [1, 60, 8192])
def test_text_is_read_as_by_the_plain_model_however_it_is_batched(tiny, monkeypatch, at_once):
    monkeypatch.setattr(float_reference, "_POSITIONS_AT_ONCE", at_once)
    lines = [Line(f"What is {'very ' * i}red?", "It is a circle" if i % 2 else "No", "t") for i in range(6)]
    suite, decoder = suite_of(tiny[1], lines), TorchDecoder(tiny[1])
    layers, end = [], tiny[1].text()[0].end_id
    found = read_tiny(tiny, suite.lines, replies_end_with=end, on_layer=lambda: layers.append(1))
    runs = len(batches(suite.lines, tiny[0].config.n_visual_tokens))
    assert len(layers) == runs * 2 and runs == {1: 6, 8192: 1}.get(at_once, runs) and (at_once != 60 or 1 < runs < 6)
    for prediction, line in zip(found, suite.lines, strict=True):
        assert prediction.embeddings is None
        assert_same(prediction, line, None, decoder, end)


@pytest.mark.parametrize("at_once", [200, 8192])
def test_images_are_read_as_by_the_plain_model_however_it_is_batched(mini, tokenized, look, monkeypatch, at_once):
    monkeypatch.setattr(float_reference, "_POSITIONS_AT_ONCE", at_once)
    decoder, end = TorchDecoder(mini[1]), mini[1].text()[0].end_id
    embeddings = look(range(len(tokenized.images)))
    found = list(float_predictions(mini[0], tokenized.lines, look, replies_end_with=end))
    for prediction, line in zip(found, tokenized.lines, strict=True):
        shown = None if line.image is None else embeddings[line.image]
        if shown is None:
            assert prediction.embeddings is None
        else:
            assert_close(prediction.embeddings, shown, "vision")
        # The bundle's matrices are rounded to float16, the checkpoint's are what was trained.
        assert_same(prediction, line, shown, decoder, end, rounded="float16")


def test_the_runtime_that_ships_reads_the_same(mini, tokenized, look):
    """Its 16-bit matrices and the vision graph are the whole difference."""
    session = Session(mini[1])
    found = float_predictions(mini[0], tokenized.lines, look, replies_end_with=session.codec.end_id)
    for theirs, ours, line in zip(found, predictions(session, tokenized), tokenized.lines, strict=True):
        assert_close(ours.log_probs, theirs.log_probs, "decoder", "float16")
        assert_close(ours.state, theirs.state, "decoder", "float16")
        assert ours.reply == theirs.reply and (ours.embeddings is None) == (line.image is None)


def test_readings_go_on_from_any_line(mini, tokenized):
    session = Session(mini[1])
    whole = list(predictions(session, tokenized))
    for first in (1, 4, len(tokenized.lines)):
        rest = list(predictions(session, tokenized, first))
        assert len(rest) == len(whole) - first
        for a, b in zip(rest, whole[first:], strict=True):
            assert np.array_equal(a.log_probs, b.log_probs) and np.array_equal(a.state, b.state) and a.reply == b.reply


def test_an_image_that_follows_itself_is_looked_at_once(mini, tokenized, monkeypatch):
    session, looked = Session(mini[1]), []
    real = session.visual_embeddings
    monkeypatch.setattr(session, "visual_embeddings", lambda image: looked.append(image) or real(image))
    list(predictions(session, tokenized))
    runs = [a.image for a, b in zip(tokenized.lines, [None, *tokenized.lines], strict=False) if b is None or a.image != b.image]
    assert len(looked) == len([p for p in runs if p is not None]) == 5


def test_replies_end_at_once_or_at_the_limit(tiny):
    """Whatever token a random model likes best after a question is taken as the end token; and one that it never says."""
    suite = suite_of(tiny[1], [Line("What is red?", "No", "t"), Line("Is it a circle or a square?", "A circle", "t")])
    free = read_tiny(tiny, suite.lines, replies_end_with=tiny[0].config.mamba.vocab)
    assert [len(r.reply) for r in free] == [reply_limit(line) for line in suite.lines]
    first = free[0].reply[0]
    assert read_tiny(tiny, suite.lines, replies_end_with=first)[0].reply == ()
    later = next(token for token in free[1].reply if token != free[1].reply[0])
    at = free[1].reply.index(later)
    assert read_tiny(tiny, suite.lines, replies_end_with=later)[1].reply == free[1].reply[:at] != ()
    last = free[1].reply[-1]
    at = free[1].reply.index(last)
    assert read_tiny(tiny, suite.lines, replies_end_with=last)[1].reply == free[1].reply[:at]
    assert all(r.reply == () for r in read_tiny(tiny, suite.lines))


def test_an_answer_that_the_model_gives_is_its_reply(tiny):
    """Then nothing is generated: teacher-forcing said it already."""
    vocab, question = tiny[0].config.mamba.vocab, suite_of(tiny[1], [Line("What is red?", "No", "t")]).lines[0]
    said = read_tiny(tiny, [question], replies_end_with=vocab)[0].reply
    end = next(token for token in said[1:] if token != said[0])
    given = [*said[: said.index(end)], end]
    asked_so = replace(question, answer=given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_reference, "reply_limit", None)  # used only to generate
        patch.setattr(TextCodec, "encode", None)
        real, blocks = float_reference.stream_blocks, []
        patch.setattr(float_reference, "stream_blocks", lambda *given, **named: blocks.append(1) or real(*given, **named))
        (found,) = read_tiny(tiny, [asked_so], replies_end_with=end)
    assert found.reply == tuple(given[:-1]) and blocks == [1]


@pytest.mark.parametrize(("precision", "bits"), [("fp16", 11), ("bf16", 8)])
def test_16_bits_are_off_by_their_roundings(tiny, precision, bits):
    suite = suite_of(tiny[1], [Line("What is red?", "It is a circle", "t"), Line("And what is not?", "No", "t")])
    for wide, narrow in zip(read_tiny(tiny, suite.lines), read_tiny(tiny, suite.lines, precision=precision), strict=True):
        rms, _ = distance(narrow.log_probs, wide.log_probs)
        # A rounding is off by 2^-bits / sqrt(12) of its step's size; some tens of them in a row.
        assert 2.0**-bits / 10 < rms < 2.0**-bits * 3
        assert divergence(wide.log_probs, narrow.log_probs).mean() > 0


def test_only_products_are_narrowed():
    """Operands and result of each product have 16 bits; a norm and its weight keep theirs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4, bias=False))
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 8)
    wide = model(x)
    assert torch.equal(narrowed(model, None)(x), wide)
    found = narrowed(model, "bf16")(x)

    def short(values):
        return values.to(torch.bfloat16).float()

    first = short(torch.nn.functional.linear(short(x), short(plain["0.weight"]), plain["0.bias"]))
    expected = short(torch.nn.functional.linear(short(torch.nn.functional.layer_norm(first, (6,))), short(plain["2.weight"])))
    assert torch.equal(found, expected) and not torch.equal(wide, found)


def test_a_float32_checkpoint_is_read_as_a_float16_one(tiny):
    """Its tensors are taken as they are, not copied: they were not made in inference mode."""
    assert {t.dtype for t in tiny[0].decoder.values()} == {torch.float32}
    assert len(read_tiny(tiny, suite_of(tiny[1], [Line("What?", "No", "t")]).lines)) == 1


def test_a_float_model_that_overflows_is_refused_with_the_line(tiny):
    suite = suite_of(tiny[1], [Line("What is red?", "No", "t")])
    line = TokenizedLine(17, suite.lines[0].line, suite.lines[0].prompt, suite.lines[0].answer, None)
    wrong = dict(tiny[0].decoder) | {"backbone.norm_f.weight": torch.full((128,), 3e38)}
    with pytest.raises(InputError, match="line 17: the logits of the float model are not finite"):
        list(float_predictions(replace(tiny[0], decoder=wrong), [line], lambda images: []))


def test_batches_hold_some_thousand_positions(monkeypatch):
    monkeypatch.setattr(float_reference, "_POSITIONS_AT_ONCE", 100)
    line = Line("q", "a", "t")
    lines = [TokenizedLine(i, line, (1,) * 8, [2, 3], image) for i, image in enumerate([0, 0, 1, None, None, 1, 2, 2, 3])]
    found = [[a.number for a in batch] for batch in batches(lines, 40)]
    assert found == [[0, 1], [2, 3, 4, 5], [6, 7], [8]]  # 40 + 20, and 50 more would be 110; 40 + 40, and 50 more are 130
    assert [n for batch in found for n in batch] == list(range(9))
    monkeypatch.setattr(float_reference, "_POSITIONS_AT_ONCE", 5)
    assert [len(batch) for batch in batches(lines, 40)] == [1] * 9  # a line longer than that is one of its own
