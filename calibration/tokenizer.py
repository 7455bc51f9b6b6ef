"""Make cobra-mini's tokenizer: a small byte-level BPE that knows the strings of the zephyr prompt.

python -m calibration.tokenizer
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cobra_edge.inputs.text import PromptTemplate

from .questions import TASKS, draw_question
from .scenes import draw_scene

VOCAB = 512
END = "<|endoftext|>"
PAD = "<|padding|>"
ROLES = ("<|user|>", "<|assistant|>")


def train_tokenizer(seed: int = 0, scenes: int = 3000) -> Tokenizer:
    """Train the BPE on prompts and answers of training scenes; END is id 0 and PAD id 1, as in GPT-NeoX."""
    rng = random.Random(seed)
    template = PromptTemplate("zephyr")
    texts = []
    for _ in range(scenes):
        scene = draw_scene(rng, "train")
        for task in TASKS:
            question = draw_question(rng, scene, task)
            if question:
                texts.append(str(template.first_turn(question.prompt)) + question.answer)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(END, special=True), AddedToken(PAD, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(role, special=False, normalized=False) for role in ROLES])
    return tokenizer


if __name__ == "__main__":
    goal = Path(__file__).parent.parent / "cobra_edge" / "mini" / "tokenizer.json"
    tokenizer = train_tokenizer()
    tokenizer.save(str(goal))
    print(f"{goal.name}: {tokenizer.get_vocab_size()} tokens")
