"""Images drawn by seed: what calibration reads where a user gives no images of their own.

Twelve kinds, from what only has the statistics of photographs (dead leaves, Lee, Mumford and Huang 2001; 1/f spectra; Baradad
et al., NeurIPS 2021, train vision models on both) to what has content to ask about: landscapes, balls and boxes in a room,
signs, pages of text, charts, screens. They are broader than any one kind of picture, and no substitute for a device's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

VERSION = 1  # of what is drawn, in the name of the folder that keeps it
SIZE = 384  # pixels, square
_TAU = 2 * math.pi
Random = np.random.Generator
Color = tuple[int, int, int]


def drawn_image(index: int) -> Image.Image:
    """Return image `index` of the series, SIZE · SIZE RGB; kinds take turns, and every image has a seed of its own."""
    random = np.random.default_rng([index, SIZE])
    return _as_by_a_camera(_KINDS[index % len(_KINDS)](random), random)


def _as_by_a_camera(image: Image.Image, random: Random) -> Image.Image:
    """Blur a little, darken or brighten, and add noise, each to a random extent."""
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.2)))
    values = np.asarray(image, np.float32) * random.uniform(0.75, 1.15)
    return _image(values + random.normal(0, random.uniform(0, 6), values.shape))


def _image(values: np.ndarray) -> Image.Image:
    """Return values (height, width, 3) float, 0 to 255, as an image."""
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _color(random: Random, low: int = 0, high: int = 256) -> Color:
    red, green, blue = (int(v) for v in random.integers(low, high, 3))
    return red, green, blue


def _shade(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, int(v * factor)) for v in color)
    return red, green, blue


def _field(random: Random, falloff: float) -> np.ndarray:
    """Return a random field (SIZE, SIZE) float32 with a spectrum of 1 / frequency^falloff, 0 to 1."""
    fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]
    scale = 1 / np.maximum(np.hypot(fy, fx), 1 / SIZE) ** falloff
    waves = scale * np.exp(1j * random.uniform(0, _TAU, scale.shape))
    field = np.fft.irfft2(waves, s=(SIZE, SIZE))
    return ((field - field.min()) / np.ptp(field)).astype(np.float32)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Return x (1, SIZE) and y (SIZE, 1), 0 to 1."""
    line = np.linspace(0, 1, SIZE, dtype=np.float32)
    return line[None], line[:, None]


def _blend(below: Color, above: Color, share: np.ndarray) -> np.ndarray:
    """Return colors (…, 3) float32 between two, by the share (…) of the second."""
    low, high = (np.asarray(color, np.float32) for color in (below, above))
    return low + (high - low) * share[..., None]


def _spectrum(random: Random) -> Image.Image:
    """Draw clouds of color."""
    field = [_field(random, random.uniform(0.8, 2.2)) for _ in range(3)]
    return _image(255 * np.stack(field, -1))


def _dead_leaves(random: Random) -> Image.Image:
    """Draw shapes that hide one another, their sizes by a power law, each with a texture."""
    canvas = _spectrum(random)
    grain = _image(255 * np.repeat(_field(random, 0.5)[..., None], 3, -1))
    for _ in range(int(random.integers(40, 250))):
        radius = int(6 / random.uniform(0.03, 1) ** 0.8)
        x, y = (int(v) for v in random.integers(-radius, SIZE + radius, 2))
        corners, turn = int(random.integers(3, 8)), random.uniform(0, _TAU)
        mask = Image.new("L", (SIZE, SIZE))
        if random.random() < 0.5:
            ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        else:
            points = [turn + _TAU * k / corners for k in range(corners)]
            ImageDraw.Draw(mask).polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in points], fill=255)
        leaf = Image.blend(Image.new("RGB", (SIZE, SIZE), _color(random)), grain, random.uniform(0, 0.4))
        canvas.paste(leaf, mask=mask)
    return canvas


def _gradient(random: Random) -> Image.Image:
    """Draw a few colors that flow into one another, and one that is flat."""
    rows, columns = (int(v) for v in random.integers(2, 5, 2))
    image = _image(random.uniform(0, 256, (rows, columns, 3))).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        x, y, w, h = (int(v) for v in random.integers(40, SIZE // 2, 4))
        ImageDraw.Draw(image).rectangle((x, y, x + w, y + h), fill=_color(random))
    return image


def _texture(random: Random) -> Image.Image:
    """Draw waves, stripes, checks or dots that repeat, bent a little."""
    x, y = _grid()
    angle, count = random.uniform(0, _TAU), random.uniform(4, 40)
    u = count * (x * math.cos(angle) + y * math.sin(angle)) + random.uniform(0, 2) * _field(random, 2)
    v = count * (y * math.cos(angle) - x * math.sin(angle))
    wave_u, wave_v = np.sin(_TAU * u), np.sin(_TAU * v)
    share = (wave_u, (wave_u > 0) * 2.0 - 1, np.sign(wave_u * wave_v), np.where(wave_u * wave_v > 0.5, 1.0, -1.0))
    found = _blend(_color(random), _color(random), share[int(random.integers(len(share)))] / 2 + 0.5)
    return _image(found + 40 * (_field(random, 1)[..., None] - 0.5))


def _ridge(random: Random, height: float, roughness: float) -> np.ndarray:
    """Return the height of a line of hills at each column, (SIZE,), in pixels from above."""
    waves = [roughness / n * np.sin(_TAU * (n * _grid()[0][0] * 1.5 + random.random())) for n in (1, 2, 3, 5, 8, 13, 21)]
    return np.asarray(SIZE * (height + np.sum(waves, 0)))


def _landscape(random: Random) -> Image.Image:
    """Draw sky, sun, hills one behind the other, water or a field, trees."""
    x, y = _grid()
    sky = _blend(_color(random, 60, 200), _color(random, 160, 256), np.broadcast_to(y, (SIZE, SIZE)))
    clouds = np.clip(_field(random, 1.8) * 2 - 1.1, 0, 1)
    found = sky + (255 - sky) * clouds[..., None]
    sun = np.hypot(x - random.uniform(0.1, 0.9), y - random.uniform(0.05, 0.4)) < random.uniform(0.03, 0.1)
    found[sun] = (255, 245, 200)
    near, texture = _color(random, 20, 110), _field(random, 1)
    for step in range(4):
        below = y * SIZE > _ridge(random, 0.35 + 0.16 * step, 0.09 / (step + 1))
        hill = _blend((150, 165, 190), near, np.full((SIZE, SIZE), (step + 1) / 4, np.float32)) * (
            0.7 + 0.6 * texture[..., None]
        )
        found[below] = hill[below]
    canvas = _image(found)
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(random.integers(0, 25))):
        at, foot = int(random.integers(SIZE)), int(random.integers(SIZE * 2 // 3, SIZE))
        tall = (foot - SIZE // 2) // 2 + 8
        draw.polygon([(at - tall // 4, foot), (at + tall // 4, foot), (at, foot - tall)], fill=_color(random, 10, 90))
    return canvas


def _balls(random: Random) -> Image.Image:
    """Draw shaded balls on a checkered floor, with their shadows."""
    x, y = _grid()
    horizon, light = random.uniform(0.3, 0.5), random.uniform(-1, 1)
    depth = 0.15 / np.maximum(y - horizon, 1e-3)
    checks = (np.floor((x - 0.5) * depth * 12) + np.floor(depth * 8)) % 2
    floor = _blend(_color(random), _color(random), checks.astype(np.float32))
    wall = _blend(_color(random, 90), _color(random, 90), np.broadcast_to(x, (SIZE, SIZE)))
    found = np.where((y > horizon)[..., None], floor, wall)
    for foot in np.sort(random.uniform(horizon + 0.05, 1, int(random.integers(1, 8)))):
        radius, at, color = 0.25 * (foot - horizon) + 0.03, random.uniform(0.1, 0.9), np.asarray(_color(random, 40), np.float32)
        shadow = ((x - at - light * radius) / (1.3 * radius)) ** 2 + ((y - foot) / (0.35 * radius)) ** 2 < 1
        found[shadow] *= 0.45
        dx, dy = (x - at) / radius, (y - foot + radius) / radius
        inside = dx**2 + dy**2 < 1
        facing = np.clip(0.55 * np.sqrt(np.maximum(0, 1 - dx**2 - dy**2)) - 0.6 * dy - 0.4 * light * dx, 0.05, None)
        shaded = np.minimum(255, color * facing[..., None] + 200 * np.maximum(0, facing[..., None] - 0.9))
        found[inside] = shaded[inside]
    return _image(found)


def _room(random: Random) -> Image.Image:
    """Draw boxes and bottles on a table in front of a wall with a window."""
    canvas = Image.new("RGB", (SIZE, SIZE), _color(random, 120))
    draw = ImageDraw.Draw(canvas)
    left, top = (int(v) for v in random.integers(20, SIZE // 2, 2))
    draw.rectangle((left, top // 2, left + 120, top // 2 + 100), fill=_color(random, 150), outline=(250, 250, 250), width=6)
    table = int(random.integers(SIZE // 2, SIZE * 3 // 4))
    draw.rectangle((0, table, SIZE, SIZE), fill=_color(random, 60, 160))
    for _ in range(int(random.integers(1, 7))):
        x, foot, wide = (
            int(v) for v in (random.integers(10, SIZE - 80), random.integers(table, SIZE), random.integers(25, 90))
        )
        tall, color = int(random.integers(30, 150)), _color(random, 40)
        if random.random() < 0.6:  # a box: front, top and side
            deep = wide // 3
            draw.rectangle((x, foot - tall, x + wide, foot), fill=color)
            draw.polygon([(x, foot - tall), (x + deep, foot - tall - deep), (x + wide + deep, foot - tall - deep),
                          (x + wide, foot - tall)], fill=_shade(color, 1.3))  # fmt: skip
            draw.polygon([(x + wide, foot), (x + wide + deep, foot - deep), (x + wide + deep, foot - tall - deep),
                          (x + wide, foot - tall)], fill=_shade(color, 0.6))  # fmt: skip
        else:  # a bottle: body and neck
            draw.rounded_rectangle((x, foot - tall, x + wide // 2, foot), wide // 6, fill=color, outline=_shade(color, 0.5))
            draw.rectangle((x + wide // 6, foot - tall - wide // 2, x + wide // 3, foot - tall), fill=_shade(color, 0.8))
    return canvas


@cache
def _words() -> list[str]:
    from .folder import read_prompts

    text = " ".join(itertools.chain.from_iterable(read_prompts().values()))
    return sorted({word.strip(".,?!'\"").lower() for word in text.split()} - {""})


def _phrase(random: Random, words: int) -> str:
    return " ".join(random.choice(_words(), words))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _page(random: Random) -> Image.Image:
    """Draw a printed page: a heading, and paragraphs."""
    canvas = Image.new("RGB", (SIZE, SIZE), _color(random, 215))
    draw, ink, small = ImageDraw.Draw(canvas), _color(random, 0, 80), int(random.integers(11, 20))
    draw.text((24, 16), _phrase(random, 3).title(), ink, _font(2 * small))
    top = 30 + 3 * small
    while top < SIZE - 2 * small:
        for _ in range(int(random.integers(2, 6))):
            draw.text((24, top), _phrase(random, int(random.integers(4, 9))), ink, _font(small))
            top += small * 3 // 2
        top += small
    return canvas.rotate(random.uniform(-4, 4), fillcolor=_color(random))


def _chart(random: Random) -> Image.Image:
    """Draw a chart of bars, a line or a pie, with a title and labels."""
    canvas = Image.new("RGB", (SIZE, SIZE), _color(random, 225))
    draw, n = ImageDraw.Draw(canvas), int(random.integers(3, 9))
    values, colors = random.uniform(0.1, 1, n), [_color(random, 0, 220) for _ in range(n)]
    draw.text((30, 10), _phrase(random, 3).capitalize(), (20, 20, 20), _font(22))
    kind, step = int(random.integers(3)), (SIZE - 80) // n
    if kind == 2:
        turns = np.cumsum([0.0, *values / values.sum()]) * 360
        for start, end, color in zip(turns[:-1], turns[1:], colors, strict=True):
            draw.pieslice((70, 70, SIZE - 70, SIZE - 70), start, end, fill=color, outline="white")
        return canvas
    tops = [(60 + step * i, SIZE - 50 - int(260 * v)) for i, v in enumerate(values)]
    if kind == 1:
        draw.line([(x + step // 2, y) for x, y in tops], fill=colors[0], width=4)
    for (x, y), value, color in zip(tops, values, colors, strict=True):
        if kind == 0:
            draw.rectangle((x + 4, y, x + step - 4, SIZE - 50), fill=color)
        draw.text((x + 4, y - 16), f"{100 * value:.0f}", (20, 20, 20), _font(12))
        draw.text((x + 2, SIZE - 46), _phrase(random, 1)[:6], (20, 20, 20), _font(12))
    draw.line([(55, 50), (55, SIZE - 50), (SIZE - 20, SIZE - 50)], fill=(20, 20, 20), width=2)
    return canvas


def _screen(random: Random) -> Image.Image:
    """Draw windows of a program: titles, buttons, fields and a table."""
    canvas = _gradient(random)
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(random.integers(1, 4))):
        x, y = (int(v) for v in random.integers(0, SIZE // 2, 2))
        w, h = (int(v) for v in random.integers(150, 260, 2))
        accent = _color(random, 40, 200)
        draw.rectangle((x, y, x + w, y + h), fill=(245, 245, 248), outline=(90, 90, 90))
        draw.rectangle((x, y, x + w, y + 22), fill=accent)
        draw.text((x + 6, y + 3), _phrase(random, 2).title(), "white", _font(14))
        for row in range(y + 32, y + h - 50, 20):
            draw.text((x + 8, row), _phrase(random, 2), (40, 40, 40), _font(12))
            draw.rectangle((x + w * 2 // 3, row, x + w - 8, row + 15), outline=(150, 150, 150))
        draw.rounded_rectangle((x + w - 80, y + h - 32, x + w - 10, y + h - 8), 6, fill=accent)
        draw.text((x + w - 70, y + h - 28), _phrase(random, 1)[:7].title(), "white", _font(13))
    return canvas


def _sign(random: Random) -> Image.Image:
    """Draw a sign or a plate with a word or a number, in front of something else."""
    canvas = (_landscape, _dead_leaves, _spectrum)[int(random.integers(3))](random)
    draw, color = ImageDraw.Draw(canvas), _color(random)
    x, y = (int(v) for v in random.integers(10, SIZE // 3, 2))
    w, h = int(random.integers(160, 230)), int(random.integers(70, 140))
    box = (x, y, x + w, y + h)
    draw.rectangle((x + w // 2 - 5, y + h, x + w // 2 + 5, SIZE), fill=(90, 90, 90))
    (draw.ellipse if random.random() < 0.3 else draw.rectangle)(box, fill=color, outline="white", width=5)
    text = str(random.integers(1, 10_000)) if random.random() < 0.5 else _phrase(random, 1)[:8].upper()
    ink = "black" if sum(color) > 380 else "white"
    draw.text((x + w // 2, y + h // 2), text, ink, _font(int(random.integers(26, 44))), anchor="mm")
    return canvas


def _collage(random: Random) -> Image.Image:
    """Draw four images of other kinds."""
    canvas, half = Image.new("RGB", (SIZE, SIZE)), SIZE // 2
    for left, top in itertools.product((0, half), repeat=2):
        kind = _KINDS[int(random.integers(len(_KINDS) - 1))]
        canvas.paste(kind(random).resize((half, half)), (left, top))
    return canvas


_KINDS: tuple[Callable[[Random], Image.Image], ...] = (
    _landscape, _page, _dead_leaves, _room, _chart, _texture, _balls, _sign, _spectrum, _screen, _gradient, _collage,
)  # fmt: skip
