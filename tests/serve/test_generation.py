"""Generation in time slices equals the session's answer, bit for bit, with any cached prefix."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import cobra_edge
from cobra_edge.decode.sampling import Sampling
from cobra_edge.inputs.image import load_image
from cobra_edge.serve import generation as answering
from cobra_edge.serve.generation import Finished, GenerationRequest, ImageEvicted, answer_in_slices
from cobra_edge.serve.prefix_cache import PrefixCache

from ..conftest import MINI

IMAGE = (MINI / "demo.png").read_bytes()
QUESTIONS = ["What is in the image?", "How many objects are there?", "Is there a red circle?"]
ROOM = 64 << 20


@pytest.fixture(scope="module", params=["native", "numpy", "torch"])
def session(request, mini_bundle):
    return cobra_edge.load(mini_bundle("w4a16-g128"), kernels=request.param)


@pytest.fixture(scope="module")
def native(mini_bundle):
    return cobra_edge.load(mini_bundle("w4a16-g128"), kernels="native")


class Recorder:
    """The logits of every step, and how often the image was looked at, read through a session."""

    def __init__(self, session, monkeypatch):
        self.logits, self.looks, self.tokens = [], 0, 0
        prefill, step, look = session.decoder.prefill, session.decoder.step, session.look

        def recorded_prefill(rows, state):
            self.tokens += len(rows)
            self.logits.append(prefill(rows, state))
            return self.logits[-1]

        def recorded_step(token, state):
            self.logits.append(step(token, state))
            return self.logits[-1]

        def recorded_look(image):
            self.looks += 1
            return look(image)

        monkeypatch.setattr(session.decoder, "prefill", recorded_prefill)
        monkeypatch.setattr(session.decoder, "step", recorded_step)
        monkeypatch.setattr(session, "look", recorded_look)


def segments(session, *turns):
    """Return the segments of question, answer, question, ..."""
    codec, template, out = session.codec, session.template, []
    for index, text in enumerate(turns):
        if index % 2:
            out.append(tuple(codec.encode(text)))
        elif index:
            out.append((codec.end_id, *codec.encode(template.later_turn(text))))
        else:
            out.append(tuple(codec.encode(template.first_turn(text))))
    return tuple(out)


def question(session, *turns, image=IMAGE, limit=40, sampling=Sampling(), stops=()):  # noqa: B008 - it is frozen
    if image is None:
        return GenerationRequest(None, None, segments(session, *turns), limit, sampling, stops)
    pixels = session.bundle.image().pixels(load_image(image))
    return GenerationRequest(hashlib.sha256(image).digest(), pixels, segments(session, *turns), limit, sampling, stops)


def answered(session, cache, asked):
    slices = list(answer_in_slices(session, cache, asked))
    assert isinstance(slices[-1], Finished) and not any(isinstance(s, Finished) for s in slices[:-1])
    return "".join(s for s in slices[:-1] if s), slices[-1]


def test_an_answer_in_slices_is_the_sessions(session):
    for text in QUESTIONS:
        same = session.ask(IMAGE, text, max_new_tokens=40)
        got, end = answered(session, PrefixCache(ROOM), question(session, text))
        assert got == same.read()
        assert (end.reason, end.completion_tokens, end.image_tokens) == ("stop", len(same.tokens), 64)
        assert (end.prompt_tokens, end.cached_tokens, end.remembered) == (64 + same.prompt_tokens, 0, "nothing")
        assert end.ttft_ms > 0 and (end.tpot_ms is None) == (len(same.tokens) < 2)


def test_a_conversation_has_the_same_bits_with_and_without_memory(session, monkeypatch):
    warm, talk, seen = PrefixCache(ROOM), [], []
    for text in QUESTIONS:
        talk.append(text)
        outcomes = []
        for cache in (warm, PrefixCache(0)):
            with monkeypatch.context() as patch:
                calls = Recorder(session, patch)
                got, end = answered(session, cache, question(session, *talk))
                outcomes.append((got, end, calls))
        (fast, fast_end, fast_calls), (slow, slow_end, slow_calls) = outcomes
        assert fast == slow and fast_end.prompt_tokens == slow_end.prompt_tokens
        steps = fast_end.completion_tokens  # the logits that chose its tokens, and the end
        for a, b in zip(fast_calls.logits[-steps:], slow_calls.logits[-steps:], strict=True):
            assert np.array_equal(a, b)
        assert (slow_end.remembered, slow_end.cached_tokens, slow_calls.looks) == ("nothing", 0, 1)
        seen.append((fast_end.remembered, fast_calls.looks))
        assert fast_end.cached_tokens == 0 or fast_calls.tokens < slow_calls.tokens
        talk.append(fast)
    assert seen == [("nothing", 1), ("conversation", 0), ("conversation", 0)]


def test_another_question_about_an_image_reads_its_own_tokens_alone(session, monkeypatch):
    cache = PrefixCache(ROOM)
    answered(session, cache, question(session, QUESTIONS[0]))
    calls = Recorder(session, monkeypatch)
    asked = question(session, QUESTIONS[1], limit=1)
    _, end = answered(session, cache, asked)
    assert (end.remembered, end.cached_tokens, calls.looks) == ("image", 64, 0)
    unread = 1 if session.decoder.same_bits_however_cut else 0  # the answer's last token, read for the next turn
    assert calls.tokens == len(asked.segments[0]) + unread


def test_only_the_same_image_is_remembered(native):
    cache = PrefixCache(ROOM)
    answered(native, cache, question(native, QUESTIONS[0]))
    other = io.BytesIO()
    Image.open(io.BytesIO(IMAGE)).rotate(90).save(other, "PNG")
    for image in (other.getvalue(), IMAGE + b"\0", None):
        got, end = answered(native, cache, question(native, QUESTIONS[0], image=image))
        assert (end.remembered, end.cached_tokens) == ("nothing", 0)
        fresh = native.ask(image, QUESTIONS[0], max_new_tokens=40)
        assert got == fresh.read()


def test_a_changed_history_is_read_from_where_it_changed(native):
    cache = PrefixCache(ROOM)
    first, _ = answered(native, cache, question(native, QUESTIONS[1]))
    _, same = answered(native, cache, question(native, QUESTIONS[1], first, QUESTIONS[2]))
    _, changed = answered(native, cache, question(native, QUESTIONS[1], first + " objects", QUESTIONS[2]))
    assert (same.remembered, changed.remembered) == ("conversation", "image")


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_turn_after_an_answer_that_was_cut_at_its_limit_is_exact(session, limit):
    cache = PrefixCache(ROOM)
    first, end = answered(session, cache, question(session, QUESTIONS[0], limit=limit))
    assert (end.reason, end.completion_tokens) == ("length", limit)
    turns = (QUESTIONS[0], first, QUESTIONS[2])
    warm, warm_end = answered(session, cache, question(session, *turns))
    cold, cold_end = answered(session, PrefixCache(0), question(session, *turns))
    assert warm == cold and warm_end.prompt_tokens == cold_end.prompt_tokens and warm_end.cached_tokens > 0


def test_the_same_seed_gives_the_same_answer_remembered_or_not(session):
    cache, sampling = PrefixCache(ROOM), Sampling(1.5, seed=7)
    texts = {answered(session, cache, question(session, QUESTIONS[0], sampling=sampling))[0] for _ in range(3)}
    assert len(texts) == 1
    others = {answered(session, cache, question(session, QUESTIONS[0], sampling=Sampling(1.5, seed=s)))[0] for s in range(4)}
    assert len(others) > 1


def test_stop_strings_end_an_answer_and_its_decoding(native, monkeypatch):
    whole, _ = answered(native, PrefixCache(0), question(native, QUESTIONS[0]))
    words = whole.split()
    stop = " ".join(words[3:5])
    calls = Recorder(native, monkeypatch)
    got, end = answered(native, PrefixCache(0), question(native, QUESTIONS[0], stops=(stop, "never")))
    assert got == whole[: whole.index(stop)] and end.reason == "stop"
    assert len(calls.logits) < 12  # the rest was not decoded


def test_after_a_stop_string_the_conversation_is_still_remembered_up_to_the_question(native):
    cache = PrefixCache(ROOM)
    got, _ = answered(native, cache, question(native, QUESTIONS[0], stops=("green",)))
    warm, end = answered(native, cache, question(native, QUESTIONS[0], got, QUESTIONS[2]))
    cold, _ = answered(native, PrefixCache(0), question(native, QUESTIONS[0], got, QUESTIONS[2]))
    assert end.remembered == "conversation" and warm == cold


def test_answers_in_turns_are_what_they_are_alone(session):
    alone = [answered(session, PrefixCache(0), question(session, text))[0] for text in QUESTIONS]
    cache = PrefixCache(ROOM)
    together = {text: answer_in_slices(session, cache, question(session, text)) for text in QUESTIONS}
    got = dict.fromkeys(QUESTIONS, "")
    while together:
        for text, slices in list(together.items()):
            step = next(slices)
            if isinstance(step, Finished):
                del together[text]
            else:
                got[text] += step or ""
    assert list(got.values()) == alone


def test_long_passages_are_read_in_pieces_between_which_others_have_a_turn(native, monkeypatch):
    monkeypatch.setattr(answering, "CHUNK", 8)
    calls = Recorder(native, monkeypatch)
    text = "Is there a red circle at the left of a large blue square?"
    asked = question(native, text, limit=3)
    slices = list(answer_in_slices(native, PrefixCache(0), asked))
    pieces = -(-len(asked.segments[0]) // 8)
    assert pieces > 1
    assert slices[: 1 + pieces] == [None] * (1 + pieces) and calls.looks == 1
    same = native.ask(IMAGE, text, max_new_tokens=3)
    assert "".join(s for s in slices[:-1] if s) == same.read()


def test_closing_the_slices_stops_the_decoding(native, monkeypatch):
    slices = answer_in_slices(native, PrefixCache(0), question(native, QUESTIONS[0]))
    while next(slices) is None:
        pass
    calls = Recorder(native, monkeypatch)
    slices.close()
    assert calls.logits == [] and list(slices) == []


def test_an_image_that_is_remembered_needs_no_pixels_and_one_that_is_not_is_asked_for(native):
    cache, asked = PrefixCache(ROOM), question(native, QUESTIONS[0])
    without = replace(asked, pixels=None)
    with pytest.raises(ImageEvicted):
        answered(native, cache, without)
    assert len(cache) == 0
    same, _ = answered(native, cache, asked)
    got, end = answered(native, cache, without)
    assert (got, end.remembered) == (same, "image")


def test_an_answer_is_not_lost_because_it_cannot_be_remembered(native, monkeypatch):
    cache, asked = PrefixCache(ROOM), question(native, QUESTIONS[0])
    list(answer_in_slices(native, cache, asked))

    def no_memory(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr(cache, "keep", no_memory)
    assert isinstance(list(answer_in_slices(native, cache, asked))[-1], Finished)
