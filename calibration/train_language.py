"""Stage language: with the vision tower frozen, projector and Mamba learn to answer questions about a scene.

An image is read once, and all questions about it continue from its state, as at inference.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from cobra_edge.inputs.text import END_OF_TEXT, PromptTemplate
from cobra_edge.model.backbones import language_backbone
from cobra_edge.model.mamba import Mamba, MambaState
from cobra_edge.model.projector import Projector
from cobra_edge.suite.line import Line

from .auxiliary_heads import IGNORED, AuxiliaryHeads, Mention, mentions
from .questions import TASKS, draw_question
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
    """Data of a step: scenes of `least` to `most` objects, `times` as many as a batch has, and the questions about each."""

    least: int
    most: int
    branches: Branches
    times: int


def lesson_at(step: int, steps: int) -> Lesson:
    """Captions of ever more objects first, then questions: the state must represent a scene before questions are learned.

    A name is learned only if it distinguishes objects, so questions start with two objects in every scene. Every fourth step
    has all tasks, so that nothing is forgotten.
    """
    done = step / steps
    if done < _CAPTIONS:
        return Lesson(1, min(1 + int(6 * done / _CAPTIONS), MAX_OBJECTS), CAPTION, 2)
    through = (done - _CAPTIONS) / (_GROWN - _CAPTIONS)
    branches = QUESTIONS if step % 4 else EVERYTHING
    if through < 1:
        return Lesson(2, 2 + int(through * (MAX_OBJECTS - 1)), branches, 1)
    return Lesson(1, MAX_OBJECTS, branches, 1)


# Shares of the steps: end of the captions-only phase, and of the growth of scenes.
_CAPTIONS, _GROWN = 0.05, 0.3
_AUXILIARY_WEIGHT = 0.5  # of the auxiliary loss relative to that of the answers


@dataclass(frozen=True, eq=False)
class Conversation:
    """One conversation as tokens.

    Attributes:
        tasks: of its turns.
        tokens: of all turns, answers included.
        answered: whether each token belongs to an answer.
        named: names of objects, with the position of their last token.
        image_at: where an image that follows the first question goes: before the mark of the answer.
    """

    tasks: list[str]
    tokens: list[int]
    answered: list[bool]
    named: list[tuple[int, Mention]]
    image_at: int = 0


def draw_conversation(rng: random.Random, tokenizer: Tokenizer, scene: Scene, tasks: tuple[str, ...]) -> Conversation:
    """Draw a conversation; a task that the scene does not allow is replaced by existence."""
    template = PromptTemplate("zephyr")
    conversation = Conversation([], [], [], [])
    image_at = 0
    for index, task in enumerate(tasks):
        turn = draw_question(rng, scene, task) or draw_question(rng, scene, "existence")
        assert isinstance(turn, Line)
        text = str(template.later_turn(turn.prompt) if index else template.first_turn(turn.prompt))
        prompt, answer = (tokenizer.encode(t, add_special_tokens=False) for t in (text, turn.answer + END_OF_TEXT))
        ends = {end: len(conversation.tokens) + at for at, (_, end) in enumerate(prompt.offsets)}
        start = text.index(turn.prompt)
        image_at = image_at or sum(end <= start + len(turn.prompt) for _, end in prompt.offsets)
        conversation.tasks.append(turn.task)
        conversation.named.extend((ends[start + m.end], m) for m in mentions(scene, turn.prompt))
        conversation.tokens.extend([*prompt.ids, *answer.ids])
        conversation.answered.extend([False] * len(prompt.ids) + [True] * len(answer.ids))
    return replace(conversation, image_at=image_at)


def batch_of(conversations: list[Conversation]) -> tuple[Tensor, Tensor]:
    """Pad conversations: tokens (n, seq) int64 and targets (n, seq) int64, IGNORED unless the next token is of an answer."""
    seq = max(len(t.tokens) for t in conversations) - 1  # nothing follows the last token
    tokens, targets = torch.zeros(len(conversations), seq, dtype=torch.int64), torch.full((len(conversations), seq), IGNORED)
    for i, conversation in enumerate(conversations):
        length = len(conversation.tokens) - 1
        tokens[i, :length] = torch.tensor(conversation.tokens[:-1])
        following = [t if a else IGNORED for t, a in zip(conversation.tokens[1:], conversation.answered[1:], strict=True)]
        targets[i, :length] = torch.tensor(following)
    return tokens, targets


def repeat_state(state: MambaState, times: int) -> MambaState:
    """Repeat the state (batch, …) of every image `times` times, repeats of an image consecutive."""
    parts = (tuple(t.repeat_interleave(times, 0) for t in tensors) for tensors in (state.conv, state.ssm))
    return MambaState(*parts)


def language_loss(
    model: Mamba,
    projector: Projector,
    heads: AuxiliaryHeads | None,
    features: Tensor,
    tokenizer: Tokenizer,
    scenes: list[Scene],
    rng: random.Random,
    branches: Branches,
    *,
    image_last: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss (mean over all answer tokens, plus the auxiliary one if there are heads) and the accuracy by task.

    With `image_last` the image follows the first question of each conversation, and every conversation reads it again.
    """
    visual = projector(features)
    after_image = None if image_last else model.hidden(visual)[1]
    losses, auxiliary = [], []
    right: dict[str, float] = {}
    for kinds in branches:
        group = [draw_conversation(rng, tokenizer, scene, kind) for scene in scenes for kind in kinds]
        tokens, targets = batch_of(group)
        if after_image is None:
            repeated = visual.repeat_interleave(len(kinds), 0)
            hidden = hidden_image_last(model, repeated, tokens, [conversation.image_at for conversation in group])
        else:
            hidden, _ = model.hidden(model.embed(tokens), repeat_state(after_image, len(kinds)))
        wanted = targets != IGNORED
        logits = model.lm_head(hidden[wanted]).float()
        losses.append(F.cross_entropy(logits, targets[wanted], reduction="none"))
        named = [(row, at, mention) for row, conversation in enumerate(group) for at, mention in conversation.named]
        if named and heads is not None:
            loss, shares = heads.loss(named)
            auxiliary.append(loss)
            right |= shares
        ok = torch.ones_like(targets, dtype=torch.bool)
        ok[wanted] = logits.argmax(-1) == targets[wanted]
        whole = ok.all(dim=1)
        for task in TASKS:
            rows = [i for i, conversation in enumerate(group) if conversation.tasks == [task]]
            if rows:
                right[task] = float(whole[rows].float().mean())
    answers = torch.cat(losses).mean()
    extra = torch.stack(auxiliary).mean() if auxiliary else torch.zeros(())
    return answers + _AUXILIARY_WEIGHT * extra, right | {"answers": float(answers.detach())}


def hidden_image_last(model: Mamba, visual: Tensor, tokens: Tensor, places: list[int]) -> Tensor:
    """Return the hidden states (n, seq, d_model) of tokens (n, seq) int64 that are read with an image among them.

    Args:
        model: the decoder.
        visual: embeddings (n, n_visual_tokens, d_model) of each row's image; their own hidden states are left out.
        tokens: of each conversation.
        places: how many tokens come before the image.
    """
    rows = zip(model.embed(tokens), visual, places, strict=True)
    hidden, _ = model.hidden(torch.stack([torch.cat([row[:at], image, row[at:]]) for row, image, at in rows]))
    size = visual.shape[1]
    return torch.stack([torch.cat([row[:at], row[at + size :]]) for row, at in zip(hidden, places, strict=True)])


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
    last = [module for module in projector.modules() if isinstance(module, nn.Linear)][-1]
    last.weight.data *= 0.2  # the tower's features are large; the layers' outputs must not be negligible beside them
