"""Questions about a scene, their answers, and the tasks they belong to.

The tasks mirror Cobra's benchmarks: existence (POPE, with adversarial negatives), spatial relation (VSR), attribute,
count, and a caption. Answers are balanced when a question is drawn, not by filtering afterwards.
"""

from __future__ import annotations

import random

from cobra_edge.suite.line import Line

from .scenes import COLOURS, SHAPES, SIZE, Scene, Thing

TASKS = ("existence", "spatial", "attribute", "count", "caption")
_MIN_OFFSET = 8.0  # pixels two centres must differ by before "left of" is asked


def draw_question(rng: random.Random, scene: Scene, task: str) -> Line | None:
    """Draw a question of a task about the scene; None if the scene allows none, for example without two distinct objects."""
    return _DRAW[task](rng, scene)


def _kinds(scene: Scene) -> dict[tuple[str, str], list[Thing]]:
    kinds: dict[tuple[str, str], list[Thing]] = {}
    for thing in scene.things:
        kinds.setdefault((thing.colour, thing.shape), []).append(thing)
    return kinds


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _existence(rng: random.Random, scene: Scene) -> Line:
    kinds = _kinds(scene)
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(kinds))
        answer = "Yes"
    else:
        colours, shapes = {c for c, _ in kinds}, {s for _, s in kinds}
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in kinds]
        # Adversarial: the colour is there and the shape is there, but not together. Half-adversarial: one of them is there.
        both = [k for k in absent if k[0] in colours and k[1] in shapes]
        one = [k for k in absent if (k[0] in colours) != (k[1] in shapes)]
        draw = rng.random()
        pool = both if both and draw < 0.8 else one if one and draw < 0.95 else absent
        colour, shape = rng.choice(pool)
        answer = "No"
    form = rng.choice(("Is there {} {}?", "Is there {} {} in the image?", "Can you see {} {}?"))
    return Line(form.format(_article(colour), shape), answer, "existence")


def _spatial(rng: random.Random, scene: Scene) -> Line | None:
    unique = [things[0] for _, things in sorted(_kinds(scene).items()) if len(things) == 1]
    pairs = [(a, b) for a in unique for b in unique if a is not b]
    rng.shuffle(pairs)
    horizontal = rng.random() < 0.5
    for a, b in pairs:
        offset = (a.x - b.x) if horizontal else (a.y - b.y)
        if abs(offset) < _MIN_OFFSET:
            continue
        truth = ("left of" if offset < 0 else "right of") if horizontal else ("above" if offset < 0 else "below")
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[truth]
        yes = rng.random() < 0.5
        relation = truth if yes else opposite
        prompt = f"Is the {a.colour} {a.shape} {relation} the {b.colour} {b.shape}?"
        return Line(prompt, "Yes" if yes else "No", "spatial")
    return None


def _attribute(rng: random.Random, scene: Scene) -> Line | None:
    options: list[tuple[str, str]] = []
    kind = rng.choice(("colour", "shape", "size"))
    for thing in scene.things:
        others = [t for t in scene.things if t is not thing]
        if kind == "colour" and all(t.shape != thing.shape for t in others):
            options.append((f"What colour is the {thing.shape}?", thing.colour.capitalize()))
        elif kind == "shape" and all(t.colour != thing.colour for t in others):
            options.append((f"What shape is the {thing.colour} object?", thing.shape.capitalize()))
        elif kind == "size" and all((t.colour, t.shape) != (thing.colour, thing.shape) for t in others):
            options.append((f"Is the {thing.colour} {thing.shape} small or large?", thing.size.capitalize()))
    if not options:
        return None
    prompt, answer = rng.choice(options)
    return Line(prompt, answer, "attribute")


def _count(rng: random.Random, scene: Scene) -> Line:
    counts: dict[int, list[str]] = {len(scene.things): ["objects"]}
    for colour in COLOURS:
        counts.setdefault(sum(t.colour == colour for t in scene.things), []).append(f"{colour} objects")
    for shape in SHAPES:
        plural = shape + ("es" if shape.endswith("s") else "s")
        counts.setdefault(sum(t.shape == shape for t in scene.things), []).append(plural)
    number = rng.choice(sorted(counts))
    return Line(f"How many {rng.choice(counts[number])} are there?", str(number), "count")


def place(thing: Thing) -> str:
    """Name the cell of a 3 × 3 grid that holds the object's centre, such as "top left"."""
    row = ("top", "", "bottom")[min(int(thing.y * 3 / SIZE), 2)]
    column = ("left", "", "right")[min(int(thing.x * 3 / SIZE), 2)]
    return " ".join(part for part in (row, column) if part) or "centre"


def _caption(rng: random.Random, scene: Scene) -> Line:
    ordered = sorted(scene.things, key=lambda t: (int(t.y * 3 / SIZE), t.x))
    parts = [f"a {t.size} {t.colour} {t.shape} at the {place(t)}" for t in ordered]
    text = ", ".join(parts)
    prompt = rng.choice(("Describe the image.", "What is in the image?"))
    return Line(prompt, text[0].upper() + text[1:] + ".", "caption")


_DRAW = {
    "existence": _existence,
    "spatial": _spatial,
    "attribute": _attribute,
    "count": _count,
    "caption": _caption,
}
