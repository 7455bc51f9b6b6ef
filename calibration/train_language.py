"""Stage language: with the eyes frozen, projector and Mamba learn to answer questions about a scene.

An image is read once and its state shared by all questions about it, exactly as the product later does.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from cobra_edge.inputs.text import END_OF_TEXT, PromptTemplate
from cobra_edge.model.backbones import language_backbone
from cobra_edge.model.mamba import Mamba, MambaState
from cobra_edge.model.projector import Projector

from .auxiliary_heads import NOTHING, Guide, Mention, mentions
from .questions import TASKS, Question, draw_question
from .scenes import MAX_OBJECTS, Scene

MAMBA = language_backbone("mamba-mini-zephyr").mamba
# A branch is a conversation that starts from the state after the image. Branches of one kind are one batch, so that short
# questions are not padded to the length of a caption.
Branches = tuple[tuple[tuple[str, ...], ...], ...]
CAPTION: Branches = ((("caption",),),)
QUESTIONS: Branches = ((("existence",),) * 2 + (("spatial",),) * 4 + (("attribute",),) * 3 + (("count",),),)
EVERYTHING: Branches = (*QUESTIONS, (("attribute", "count"),), *CAPTION)


@dataclass(frozen=True)
class Lesson:
    """What a step is about: scenes of `least` to `most` objects, `times` as many as a batch has, and what is asked of each."""

    least: int
    most: int
    branches: Branches
    times: int


def lesson_at(step: int, steps: int) -> Lesson:
    """Captions first, of ever more objects: a state must hold a scene before questions can be asked of it. Then questions.

    An object is found by its name only where there is another to be mistaken for, so questions begin with two objects in every
    scene. Every fourth step asks everything, so that nothing is lost.
    """
    done = step / steps
    if done < _CAPTIONS:
        return Lesson(1, min(1 + int(6 * done / _CAPTIONS), MAX_OBJECTS), CAPTION, 2)
    through = (done - _CAPTIONS) / (_GROWN - _CAPTIONS)
    branches = QUESTIONS if step % 4 else EVERYTHING
    if through < 1:
        return Lesson(2, 2 + int(through * (MAX_OBJECTS - 1)), branches, 1)
    return Lesson(1, MAX_OBJECTS, branches, 1)


# The share of the steps after which captions alone end, and after which scenes have all their objects.
_CAPTIONS, _GROWN = 0.05, 0.3
_GUIDANCE = 0.5  # weight of the guide's loss beside that of the answers


@dataclass(frozen=True, eq=False)
class Talk:
    """One conversation as tokens.

    Attributes:
        tasks: of its turns.
        tokens: all turns, answers included.
        answered: for each token, whether it belongs to an answer.
        named: names of objects, at the position of their last token.
    """

    tasks: list[str]
    tokens: list[int]
    answered: list[bool]
    named: list[tuple[int, Mention]]


def draw_talk(rng: random.Random, tokenizer: Tokenizer, scene: Scene, tasks: tuple[str, ...]) -> Talk:
    """Draw a conversation; a task the scene does not allow is replaced by a question of existence."""
    template = PromptTemplate("zephyr")
    talk = Talk([], [], [], [])
    for index, task in enumerate(tasks):
        turn = draw_question(rng, scene, task) or draw_question(rng, scene, "existence")
        assert isinstance(turn, Question)
        text = str(template.later_turn(turn.prompt) if index else template.first_turn(turn.prompt))
        asked, answer = (tokenizer.encode(t, add_special_tokens=False) for t in (text, turn.answer + END_OF_TEXT))
        ends = {end: len(talk.tokens) + at for at, (_, end) in enumerate(asked.offsets)}
        start = text.index(turn.prompt)
        talk.tasks.append(turn.task)
        talk.named.extend((ends[start + m.end], m) for m in mentions(scene, turn.prompt))
        talk.tokens.extend([*asked.ids, *answer.ids])
        talk.answered.extend([False] * len(asked.ids) + [True] * len(answer.ids))
    return talk


def batch_of(talks: list[Talk]) -> tuple[Tensor, Tensor]:
    """Pad conversations: tokens (n, seq) and targets (n, seq), NOTHING where the next token is no answer."""
    seq = max(len(t.tokens) for t in talks) - 1  # nothing follows the last token
    tokens, targets = torch.zeros(len(talks), seq, dtype=torch.int64), torch.full((len(talks), seq), NOTHING)
    for i, talk in enumerate(talks):
        length = len(talk.tokens) - 1
        tokens[i, :length] = torch.tensor(talk.tokens[:-1])
        following = [t if a else NOTHING for t, a in zip(talk.tokens[1:], talk.answered[1:], strict=True)]
        targets[i, :length] = torch.tensor(following)
    return tokens, targets


def repeat_state(state: MambaState, times: int) -> MambaState:
    """Give every image of the batch `times` branches, branches of an image side by side."""
    parts = (tuple(t.repeat_interleave(times, 0) for t in tensors) for tensors in (state.conv, state.ssm))
    return MambaState(*parts)


def language_loss(
    model: Mamba,
    projector: Projector,
    guide: Guide,
    features: Tensor,
    tokenizer: Tokenizer,
    scenes: list[Scene],
    rng: random.Random,
    branches: Branches,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss (the mean over all tokens of answers, and the guide's) and how often each task's answer is right."""
    _, after_image = model.hidden(projector(features))
    losses, guided = [], []
    right: dict[str, float] = {}
    for kinds in branches:
        group = [draw_talk(rng, tokenizer, scene, kind) for scene in scenes for kind in kinds]
        tokens, targets = batch_of(group)
        hidden, _ = model.hidden(model.embed(tokens), repeat_state(after_image, len(kinds)))
        wanted = targets != NOTHING
        logits = model.lm_head(hidden[wanted]).float()
        losses.append(F.cross_entropy(logits, targets[wanted], reduction="none"))
        named = [(row, at, mention) for row, talk in enumerate(group) for at, mention in talk.named]
        if named:
            loss, shares = guide.loss(named)
            guided.append(loss)
            right |= shares
        ok = torch.ones_like(targets, dtype=torch.bool)
        ok[wanted] = logits.argmax(-1) == targets[wanted]
        whole = ok.all(dim=1)
        for task in TASKS:
            rows = [i for i, talk in enumerate(group) if talk.tasks == [task]]
            if rows:
                right[task] = float(whole[rows].float().mean())
    answers = torch.cat(losses).mean()
    guidance = torch.stack(guided).mean() if guided else torch.zeros(())
    return answers + _GUIDANCE * guidance, right | {"answers": float(answers.detach())}


def initialise(model: Mamba, projector: Projector, seed: int) -> None:
    """Initialise as Mamba does (Gu and Dao 2023, section 3.6): dt log-uniform in 0.001..0.1, small outputs."""
    torch.manual_seed(seed)
    nn.init.normal_(model.backbone.embedding.weight, std=0.02)
    for layer in model.backbone.layers:
        mixer: Any = layer.mixer
        for linear in (mixer.in_proj, mixer.x_proj, mixer.out_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        mixer.out_proj.weight.data /= math.sqrt(len(model.backbone.layers))
        nn.init.uniform_(mixer.dt_proj.weight, -(mixer.dt_rank**-0.5), mixer.dt_rank**-0.5)
        dt = torch.exp(torch.empty(MAMBA.d_inner).uniform_(math.log(1e-3), math.log(1e-1)))
        mixer.dt_proj.bias.data = dt + torch.log(-torch.expm1(-dt))
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    last: Any = list(projector.modules())[-1]
    last.weight.data *= 0.2  # the towers' features are large; layers must be heard beside them
