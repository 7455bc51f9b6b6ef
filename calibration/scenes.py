"""Synthetic scenes: a few coloured shapes on a cluttered background, drawn with pillow.

A scene belongs to exactly one split, decided by a hash of its content: whatever the seed, a training run cannot draw a scene
of the held-out suite or of the calibration set, because such a scene is rejected when it comes up.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass
from typing import Literal

from PIL import Image, ImageDraw

SIZE = 112
SUPERSAMPLING = 3
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 220),
    "yellow": (236, 200, 28),
    "purple": (138, 50, 180),
    "orange": (244, 126, 20),
}
RADIUS = {"small": (7.0, 8.5), "large": (12.0, 15.0)}
MAX_OBJECTS = 5

Split = Literal["train", "heldout", "calibration"]


@dataclass(frozen=True)
class Thing:
    """One object: centre and radius in pixels of a SIZE × SIZE image, rotation in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Objects plus the seed of the background and clutter, which carry no answer."""

    things: tuple[Thing, ...]
    clutter_seed: int

    @property
    def split(self) -> Split:
        """The split this scene belongs to: 1 in 32 is held out, 1 in 32 is for calibration."""
        content = json.dumps([asdict(t) for t in self.things], sort_keys=True).encode()
        bucket = hashlib.blake2b(content, digest_size=4).digest()[0] % 32
        return "heldout" if bucket == 0 else "calibration" if bucket == 1 else "train"


def draw_scene(rng: random.Random, split: Split, most: int = MAX_OBJECTS, least: int = 1) -> Scene:
    """Draw a random scene of the wanted split with `least` to `most` objects (fewer where there is no room)."""
    while True:
        scene = _any_scene(rng, least, most)
        if scene.split == split:
            return scene


def _any_scene(rng: random.Random, least: int, most: int) -> Scene:
    shapes, colours = list(SHAPES), list(COLOURS)
    # Half of the scenes repeat a shape or a colour, or counts above one would be rare.
    repeat = rng.random()
    if repeat < 0.25:
        shapes = [rng.choice(shapes)] * 3 + shapes[:2]
    elif repeat < 0.5:
        colours = [rng.choice(colours)] * 4 + rng.sample(colours, 2)
    things: list[Thing] = []
    wanted = rng.randint(least, most)
    for _ in range(60):
        if len(things) == wanted:
            break
        size = rng.choice(list(RADIUS))
        radius = round(rng.uniform(*RADIUS[size]), 1)
        x, y = (round(rng.uniform(radius + 2, SIZE - radius - 2), 1) for _ in "xy")
        if all(math.hypot(x - t.x, y - t.y) > radius + t.radius + 3 for t in things):
            angle = round(rng.uniform(-18, 18), 1)
            things.append(Thing(rng.choice(shapes), rng.choice(colours), size, x, y, radius, angle))
    return Scene(tuple(things), rng.getrandbits(32))


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Return the polygon of a shape in pixels of the final image."""
    r, turn = thing.radius, math.radians(thing.angle)
    if thing.shape == "square":
        unit = [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    elif thing.shape == "triangle":
        unit = [(math.sin(a), -math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    elif thing.shape == "star":
        unit = [
            (math.sin(k * math.pi / 5) * s, -math.cos(k * math.pi / 5) * s)
            for k, s in ((k, 1.0 if k % 2 == 0 else 0.42) for k in range(10))
        ]
    else:  # cross
        w = 0.32
        unit = [
            (-w, -1),
            (w, -1),
            (w, -w),
            (1, -w),
            (1, w),
            (w, w),
            (w, 1),
            (-w, 1),
            (-w, w),
            (-1, w),
            (-1, -w),
            (-w, -w),
        ]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(thing.x + r * (px * cos - py * sin), thing.y + r * (px * sin + py * cos)) for px, py in unit]


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of SIZE × SIZE pixels; the same scene always gives the same pixels."""
    rng = random.Random(scene.clutter_seed)
    s = SUPERSAMPLING
    base, tint = rng.randint(205, 245), [rng.randint(-8, 8) for _ in range(3)]
    background = tuple(base + t for t in tint)
    image = Image.new("RGB", (SIZE * s, SIZE * s), background)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 5)):
        grey = rng.randint(110, 200)
        ends = [rng.uniform(0, SIZE * s) for _ in range(4)]
        pen.line(ends, fill=(grey, grey, grey), width=rng.randint(1, 4))
    for _ in range(rng.randint(0, 14)):
        grey, r = rng.randint(90, 200), rng.uniform(1, 5)
        x, y = rng.uniform(0, SIZE * s), rng.uniform(0, SIZE * s)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(grey, grey, grey))
    for thing in scene.things:
        fill = tuple(max(0, min(255, c + rng.randint(-14, 14))) for c in COLOURS[thing.colour])
        if thing.shape == "circle":
            x, y, r = thing.x * s, thing.y * s, thing.radius * s
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        else:
            pen.polygon([(x * s, y * s) for x, y in _outline(thing)], fill=fill)
    return image.reduce(s)
