"""Training data of stage language: names found in questions, their labels, and where they stand among the tokens."""

import random

import pytest
import torch
from tokenizers import Tokenizer

from calibration.auxiliary_heads import ABOUT_ONE, ABOUT_TWO, IGNORED, AuxiliaryHeads, mentions
from calibration.questions import TASKS
from calibration.scenes import MAX_OBJECTS, Scene, Thing, draw_scene
from calibration.train_language import CAPTION, MAMBA, batch_of, draw_conversation, lesson_at
from cobra_edge.decode.native_operations import differentiable_operations
from cobra_edge.model.mamba import Mamba

from ..conftest import MINI

CIRCLE = Thing("circle", "red", "small", x=20, y=90, radius=8, angle=0)
SQUARE = Thing("square", "blue", "large", x=80, y=91, radius=13, angle=0)
CROSS = Thing("cross", "blue", "small", x=50, y=20, radius=8, angle=0)
SCENE = Scene((CIRCLE, SQUARE, CROSS), 0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MINI / "tokenizer.json"))


def told(prompt):
    return [{k: v for k, v in m.labels.items() if v != IGNORED} for m in mentions(SCENE, prompt)]


def test_two_names_and_how_they_lie():
    first, second = told("Is the red circle left of the blue square?")
    assert first == {"there": 1, "colour": 0, "shape": 0, "size": 0, "column": 2, "row": 12}
    assert (second["colour"], second["shape"], second["size"]) == (2, 1, 1)
    assert second["across"] == 1 and "down" not in second  # a pixel apart is neither above nor below


def test_a_name_without_its_object_is_only_absent():
    assert told("Is there a red square?") == [{"there": 0}]


def test_a_name_that_fits_two_says_only_that_something_is_there():
    assert told("What shape is the blue object?") == [{"there": 1}]


@pytest.mark.parametrize("prompt", ["How many circles are there?", "How many blue objects are there?", "Describe the image."])
def test_plurals_are_no_names(prompt):
    assert told(prompt) == []


def test_a_half_name_is_enough_where_it_is_unique():
    assert told("What colour is the cross?")[0]["colour"] == 2


def test_labels_fit_their_heads():
    sizes, rng = ABOUT_ONE | ABOUT_TWO, random.Random(3)
    for _ in range(50):
        scene = draw_scene(rng, "train")
        for thing in scene.things:
            for mention in mentions(scene, f"Is there a {thing.colour} {thing.shape}?"):
                assert all(value == IGNORED or 0 <= value < sizes[label] for label, value in mention.labels.items())


@pytest.mark.parametrize("tasks", [("spatial",), ("existence",), ("attribute", "count")])
def test_names_stand_at_their_last_token(tokenizer, tasks):
    rng = random.Random(1)
    for _ in range(20):
        conversation = draw_conversation(rng, tokenizer, draw_scene(rng, "train", least=3), tasks)
        for at, mention in conversation.named:
            assert not conversation.answered[at]
            word = tokenizer.decode([conversation.tokens[at]]).strip()
            assert word in ("circle", "square", "triangle", "star", "cross", "object"), (word, mention)


def test_only_answers_are_targets(tokenizer):
    rng = random.Random(2)
    conversations = [draw_conversation(rng, tokenizer, draw_scene(rng, "train"), (task,)) for task in TASKS]
    tokens, targets = batch_of(conversations)
    for row, conversation in enumerate(conversations):
        asked = conversation.answered.index(True)
        assert (targets[row, : asked - 1] == IGNORED).all()
        answer = conversation.tokens[asked:]
        assert targets[row, asked - 1 : asked - 1 + len(answer)].tolist() == answer
        assert tokens[row, : len(conversation.tokens) - 1].tolist() == conversation.tokens[:-1]


def test_auxiliary_heads_reach_every_layer_below_them(tokenizer):
    torch.manual_seed(0)
    model = Mamba(MAMBA, differentiable_operations())
    heads, rng = AuxiliaryHeads(model), random.Random(0)
    conversation = draw_conversation(rng, tokenizer, draw_scene(rng, "train", least=4), ("spatial",))
    tokens, _ = batch_of([conversation])
    model.hidden(model.embed(tokens))
    loss, right = heads.loss([(0, at, mention) for at, mention in conversation.named])
    loss.backward()
    reached = [float(layer.mixer.in_proj.weight.grad.abs().sum()) > 0 for layer in model.backbone.layers[:-1]]
    assert all(reached) and model.backbone.layers[-1].mixer.in_proj.weight.grad is None
    assert set(right) == {"heads_one", "heads_two"}


def test_lessons_grow():
    lessons = [lesson_at(step, 1000) for step in range(1000)]
    assert lessons[0].branches == CAPTION and lessons[0].most == 1
    assert lessons[-1].least == 1 and lessons[-1].most == MAX_OBJECTS
    asked = [x for x in lessons if x.branches != CAPTION]
    assert all(b.most >= a.most for a, b in zip(asked, asked[1:], strict=False))
    assert asked[0].least == asked[0].most == 2
