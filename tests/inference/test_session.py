"""Sessions: looking once and asking often, prompts, limits, streaming."""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import cobra_edge
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode import backends
from cobra_edge.decode.decoder import DEFAULT_OPTIONS, DecoderOptions
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.decode.sampling import Sampling, choose
from cobra_edge.errors import InputError
from cobra_edge.inference import session as session_module
from cobra_edge.inputs.text import PromptTemplate, TextCodec
from cobra_edge.vision.runtimes import open_vision

from ..conftest import MINI

IMAGE = MINI / "demo.png"
QUESTIONS = ["What is in the image?", "How many objects are there?", "Is there a red circle?"]


@pytest.fixture(scope="module")
def session(mini_bundle):
    return cobra_edge.load(mini_bundle("w4a16-g128"))


@pytest.fixture(scope="module")
def blind(tiny_bundle):
    return cobra_edge.load(tiny_bundle)


@pytest.mark.parametrize("kernels", ["native", "numpy", "torch"])
def test_asking_a_remembered_image_gives_the_same_bits(mini_bundle, kernels, tmp_path):
    session = cobra_edge.load(mini_bundle("w4a16-g128"), kernels=kernels)
    state = session.look(IMAGE)
    before = state.copy()
    state.save(tmp_path / "state.safetensors")
    loaded = cobra_edge.DecoderState.load(tmp_path / "state.safetensors", session.config.mamba)
    for question in QUESTIONS:
        fresh = session.ask(IMAGE, question)
        fresh.read()
        for remembered in (state, loaded):
            again = session.ask(remembered, question)
            assert (again.read(), again.tokens) == (fresh.text, fresh.tokens)
            assert again.visual_tokens == 64
    assert np.array_equal(before.ssm, state.ssm) and np.array_equal(before.conv, state.conv)


class OnGpu(NumpyDecoder):
    """A decoder whose GPU is this process's memory: rooms begin as NaNs, and are read where vision left them."""

    stream = 7

    def __init__(self, bundle, options=DEFAULT_OPTIONS):
        super().__init__(bundle, options)
        self.rooms = []

    def embedding_room(self, n):
        memory = np.full((n, self.config.d_model), np.nan, np.float32)
        self.rooms.append(SimpleNamespace(address=memory.ctypes.data, shape=memory.shape, memory=memory))
        return self.rooms[-1]

    def prefill(self, embeddings, state):
        return super().prefill(getattr(embeddings, "memory", embeddings), state)


class Eyes:
    """A runner on that GPU, around one that is not."""

    def __init__(self, runner):
        self.runner, self.embed, self.asked = runner, None, []

    def embed_into(self, pixels, address, stream):
        seen = self.runner.embed(pixels)
        ctypes.memmove(address, seen.ctypes.data, seen.nbytes)
        self.asked.append((address, stream))


@pytest.fixture
def gpu_session(mini_bundle, monkeypatch):
    """Return a session whose decoder and eyes are on that GPU, and what its eyes were opened with."""
    opened = []

    def eyes(bundle, *arguments):
        opened.append(arguments)
        return Eyes(open_vision(bundle, "cpu"))

    row = backends.Backend("gpu", "cuda", lambda bundle: None, OnGpu)
    monkeypatch.setattr(backends, "BACKENDS", (row,))
    monkeypatch.setattr(session_module, "open_vision", eyes)
    return cobra_edge.load(mini_bundle("w4a16-g128")), opened


def test_embeddings_stay_on_the_gpu_where_eyes_and_decoder_are_there(gpu_session, mini_bundle):
    session, opened = gpu_session
    assert opened == [("auto", "auto", None, 7)]  # the stream, last
    expected = NumpyDecoder(Bundle.open(mini_bundle("w4a16-g128")))
    state, wanted = session.look(IMAGE), expected.new_state()
    (room,) = session.decoder.rooms
    assert session.vision.asked == [(room.address, 7)] and room.shape == (64, 256)
    expected.prefill(room.memory, wanted)
    assert np.array_equal(state.ssm, wanted.ssm) and np.array_equal(state.conv, wanted.conv) and state.n_tokens == 64
    assert session.ask(IMAGE, QUESTIONS[0]).read() == session.ask(state, QUESTIONS[0]).read() != ""
    assert len(session.decoder.rooms) == 2
    session.vision.embed = session.vision.runner.embed
    assert np.array_equal(session.visual_embeddings(IMAGE), room.memory)


def test_threads_that_look_with_one_session_see_their_own_image(gpu_session, monkeypatch):
    session, _ = gpu_session
    images = [np.full((112, 112, 3), shade, np.uint8) for shade in (0, 255)]
    alone = [session.look(image).ssm for image in images]
    room = session.decoder.rooms[0]
    here, prefill = threading.Barrier(2), OnGpu.prefill

    def slow(decoder, embeddings, state):
        with suppress(threading.BrokenBarrierError):
            here.wait(0.5)  # for the other image, which must not come before this one was read
        return prefill(decoder, embeddings, state)

    monkeypatch.setattr(OnGpu, "embedding_room", lambda decoder, n: room)
    monkeypatch.setattr(OnGpu, "prefill", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda image: session.look(image).ssm, images))
    assert not np.array_equal(*alone) and np.array_equal(found, alone)


@pytest.mark.parametrize("half", ["eyes", "decoder"])
def test_embeddings_go_through_an_array_where_one_half_is_not_on_the_gpu(gpu_session, monkeypatch, half):
    session, _ = gpu_session
    on_gpu = session.look(IMAGE)
    if half == "eyes":
        session.vision = session.vision.runner
    else:
        monkeypatch.setattr(OnGpu, "stream", None)
        session.vision.embed = session.vision.runner.embed
    state = session.look(IMAGE)
    assert len(session.decoder.rooms) == 1
    assert np.array_equal(state.ssm, on_gpu.ssm) and np.array_equal(state.conv, on_gpu.conv)


def test_vision_takes_as_many_threads_as_the_decoder(mini_bundle):
    session = cobra_edge.load(mini_bundle("w4a16-g128"), options=DecoderOptions(threads=1))
    options = session.vision._session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_sampled_answers_repeat_with_their_seed(session):
    state = session.look(IMAGE)
    warm = [session.ask(state, QUESTIONS[0], sampling=Sampling(1.5, seed=s)).read() for s in (1, 1, 2, 3, 4)]
    assert warm[0] == warm[1]
    assert len(set(warm)) > 1


def test_pieces_add_up_and_figures_are_there(session):
    answer = session.ask(IMAGE, QUESTIONS[0])
    pieces = list(answer)
    assert "".join(pieces) == answer.text and len(pieces) > 3
    assert answer.finish == "end" and answer.ttft_ms > 0 and answer.tpot_ms > 0
    short = session.ask(IMAGE, QUESTIONS[0], max_new_tokens=2)
    short.read()
    assert (short.finish, len(short.tokens)) == ("length", 2)


def test_images_come_in_every_form(session):
    image = Image.open(IMAGE)
    forms = [IMAGE, str(IMAGE), IMAGE.read_bytes(), image]
    assert len({session.ask(form, QUESTIONS[1]).read() for form in forms}) == 1


def test_a_question_about_nothing_seen(session, blind):
    assert isinstance(session.ask(None, "Hello?", max_new_tokens=4).read(), str)
    answer = blind.ask(None, "Hello?", max_new_tokens=4)
    answer.read()
    assert answer.visual_tokens == 0
    with pytest.raises(InputError, match="text-only"):
        blind.ask(IMAGE, "Hello?")


@pytest.mark.parametrize("prompt", ["", "   \n", "<image>", " <image> "])
def test_an_empty_prompt_is_refused(session, prompt):
    with pytest.raises(InputError, match="prompt is empty"):
        session.ask(IMAGE, prompt)


def test_a_prompt_longer_than_the_model_takes(session):
    with pytest.raises(InputError, match=r"the prompt is \d+ tokens, the model takes 959 after 64 already read"):
        session.ask(IMAGE, "a red circle " * 400)
    with pytest.raises(InputError, match="max-new-tokens"):
        session.ask(IMAGE, "Hello?", max_new_tokens=0)


def test_an_answer_ends_where_the_model_does(session, monkeypatch):
    """A decoder that never ends an answer: it stops at the last position the model was made for."""
    real = session.decoder.step

    def never_ending(token, state):
        logits = real(token, state)
        logits[session.codec.end_id] = -1e9
        return logits

    monkeypatch.setattr(session.decoder, "step", never_ending)
    answer = session.ask(IMAGE, "x " * 430, max_new_tokens=10_000)
    answer.read()
    assert answer.finish == "length"
    assert len(answer.tokens) == session.config.max_length - 64 - answer.prompt_tokens


@pytest.mark.parametrize("limit", [256, 2])
def test_a_conversation_goes_on_from_its_answer(session, limit):
    """Asking on gives the bits that reading the whole conversation at once gives, also after an answer that was cut short."""
    first = session.ask(IMAGE, QUESTIONS[1], max_new_tokens=limit)
    with pytest.raises(InputError, match="the answer has not ended"):
        session.ask(first, QUESTIONS[2])
    first.read()
    second = session.ask(first, QUESTIONS[2])
    again = session.ask(first, QUESTIONS[2])
    assert second.read() == again.read() != ""
    assert second.visual_tokens == 64
    said = [*first.tokens, session.codec.end_id]
    whole = session.codec.encode(session.template.first_turn(QUESTIONS[1])) + said
    whole += session.codec.encode(session.template.later_turn(QUESTIONS[2]))
    state = session.look(IMAGE)
    logits = session.decoder.prefill(session.decoder.embed(whole), state)
    assert int(np.argmax(logits)) == second.tokens[0]
    assert second.state.n_tokens == state.n_tokens + len(second.tokens)


def test_templates():
    zephyr, base = PromptTemplate("zephyr"), PromptTemplate("base")
    assert str(zephyr.first_turn(" <image>\nHi ")) == "<|user|>\nHi<|endoftext|>\n<|assistant|>\n"
    assert str(base.first_turn("Hi")) == "In: Hi\nOut: "
    turns = [("Hi", "Hello"), ("More", None)]
    assert str(zephyr.conversation(turns)) == (
        "<|user|>\nHi<|endoftext|>\n<|assistant|>\nHello<|endoftext|>\n<|user|>\nMore<|endoftext|>\n<|assistant|>\n"
    )
    assert str(base.conversation(turns)) == "In: Hi\nOut: Hello<|endoftext|>\nIn: More\nOut: "
    assert str(base.conversation([("Hi", "")])) == "In: Hi\nOut:  <|endoftext|>"
    assert str(base.conversation([("Hi", " <image> \n")])) == "In: Hi\nOut:  <|endoftext|>"
    assert str(base.conversation([("Hi", "\n Hel<image>lo ")])) == "In: Hi\nOut: Hello<|endoftext|>"


def test_tokenizer_knows_the_strings_of_the_prompt():
    codec = TextCodec.open(MINI / "tokenizer.json", 512)
    tokens = codec.encode(PromptTemplate("zephyr").first_turn("Is there a red circle?"))
    words = [codec.tokenizer.id_to_token(t) for t in tokens]
    assert {"<|user|>", "<|endoftext|>", "<|assistant|>"} <= set(words)
    assert codec.end_id == codec.tokenizer.token_to_id("<|endoftext|>") == 0
    odd = "naïve 日本 🎈"
    assert codec.decode(codec.encode(odd)) == odd


def test_choosing():
    rng = np.random.default_rng(0)
    logits = np.array([0.0, 3.0, 2.0, -9.0], np.float32)
    assert choose(logits, Sampling(), 0.5) == 1
    assert {choose(logits, Sampling(1.0, top_k=2), rng.random()) for _ in range(200)} == {1, 2}
    assert {choose(logits, Sampling(1.0, top_p=0.5), rng.random()) for _ in range(50)} == {1}
    counts = np.bincount([choose(logits, Sampling(1.0), rng.random()) for _ in range(4000)], minlength=4)
    p = np.exp(logits) / np.exp(logits).sum()
    assert np.abs(counts / 4000 - p).max() < 0.03
    with pytest.raises(InputError, match="not finite"):
        choose(np.array([0.0, np.nan], np.float32), Sampling(), 0.5)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=40), Sampling(1.5, top_p=0.9), Sampling(2.0, 30, 0.5)])
def test_a_seed_draws_what_numpy_would_choose(sampling):
    logits = 3 * np.random.default_rng(1).standard_normal(500).astype(np.float32)
    p = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    p = p[order] / p[order].sum()
    kept = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
    p = p[:kept] / p[:kept].sum()
    ours, numpys = np.random.default_rng(7), np.random.default_rng(7)
    got = [choose(logits, sampling, ours.random()) for _ in range(300)]
    assert got == [numpys.choice(order[:kept], p=p) for _ in range(300)]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"seed": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 2}]
)
def test_sampling_that_means_nothing(bad):
    with pytest.raises(InputError):
        Sampling(**bad)


def test_a_state_of_another_model_is_refused(session, blind):
    with pytest.raises(InputError, match="the state belongs to another model"):
        session.ask(blind.decoder.new_state(), "Is there a red circle?")


def test_what_a_state_has_read_counts_against_the_limit(session):
    state = session.look(MINI / "demo.png")
    state.n_tokens = session.config.max_length - 3
    with pytest.raises(InputError, match="the model takes 2 after 1021 already read"):
        session.ask(state, "Is there a red circle?")


def test_the_smallest_temperature_is_greedy():
    logits, rng = np.array([0.5, 3.0, 2.9], np.float32), np.random.default_rng(0)
    assert {choose(logits, Sampling(temperature=1e-320), rng.random()) for _ in range(20)} == {1}


@pytest.mark.parametrize("pieces_read", [0, 1, 2, 99])
def test_a_stopped_answer_can_be_asked_on_as_if_it_had_ended_there(session, pieces_read):
    answer = session.ask(IMAGE, QUESTIONS[0])
    for _ in zip(range(pieces_read), answer, strict=False):
        pass
    answer.stop()
    text, tokens = answer.text, list(answer.tokens)
    assert list(answer) == [] and answer.tokens == tokens
    assert answer.finish == ("end" if pieces_read == 99 else "stopped")
    follow_up = session.ask(answer, QUESTIONS[1])
    follow_up.read()
    state = session.look(IMAGE)
    codec, template = session.codec, session.template
    turns = [*codec.encode(template.first_turn(QUESTIONS[0])), *tokens]
    turns += [codec.end_id, *codec.encode(template.later_turn(QUESTIONS[1]))]
    again = session.generate(session.prefill(turns, state), state, 256, Sampling())
    assert again.read() == follow_up.text
    assert text == codec.decode(tokens)


def test_a_frame_is_asked_about_as_the_image_it_is(session):
    frame = np.asarray(Image.open(IMAGE).convert("RGB"))
    expected = session.look(IMAGE)
    for array, order in ((frame, "rgb"), (frame[..., ::-1], "bgr")):
        assert np.array_equal(session.look(array, channel_order=order).ssm, expected.ssm)
    assert session.ask(frame[..., ::-1], QUESTIONS[0], channel_order="bgr").read() == session.ask(IMAGE, QUESTIONS[0]).read()
    assert not np.array_equal(session.visual_embeddings(frame), session.visual_embeddings(frame, channel_order="bgr"))
    assert session.look(frame[..., 1]).n_tokens == 64  # grey


def test_what_is_no_image_is_refused_with_what_is(session):
    with pytest.raises(InputError, match=r"dtype float64, expected \(height, width, 3\)"):
        session.ask(np.zeros((8, 8, 3)), QUESTIONS[0])
    with pytest.raises(InputError, match="a list, expected a path, a file's bytes, a pillow image or a numpy array"):
        session.ask([[0, 0], [0, 0]], QUESTIONS[0])
    with pytest.raises(InputError, match="unknown channel order 'brg'"):
        session.look(IMAGE, channel_order="brg")
    with pytest.raises(InputError, match="channel_order='bgr' is for arrays"):
        session.look(IMAGE, channel_order="bgr")


def test_a_closed_session_is_refused(mini_bundle):
    with cobra_edge.load(mini_bundle("w4a16-g128")) as session:
        state = session.look(IMAGE)
        begun = session.ask(state, QUESTIONS[1])
        expected = session.ask(state, QUESTIONS[1]).read()
    assert begun.read() == expected  # it had begun
    uses = [
        lambda: session.look(IMAGE),
        lambda: session.visual_embeddings(IMAGE),
        lambda: session.ask(IMAGE, QUESTIONS[0]),
        lambda: session.ask(state, QUESTIONS[0]),
        lambda: session.ask(None, QUESTIONS[0]),
        lambda: session.ask(begun, QUESTIONS[0]),
        lambda: session.prefill([1, 2], state),
        lambda: session.decoder.new_state(),
    ]
    for use in uses:
        with pytest.raises(InputError, match="the session is closed; open the bundle again with cobra_edge.load"):
            use()
    session.close()  # nothing happens


def test_a_vision_runtime_that_was_handed_in_stays_open(mini_bundle):
    bundle = Bundle.open(mini_bundle("w4a16-g128"))
    vision = open_vision(bundle, "cpu")
    with cobra_edge.Session(bundle, vision=vision):
        pass
    assert vision.embed(bundle.image().pixels(Image.open(IMAGE).convert("RGB"))).shape == (64, 256)


def test_an_error_inside_closes_the_session(tiny_bundle):
    with pytest.raises(KeyError), cobra_edge.load(tiny_bundle) as session:
        raise KeyError
    with pytest.raises(InputError, match="the session is closed"):
        session.ask(None, "Hello?")
