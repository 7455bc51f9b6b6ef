"""Bundles with random weights in published shapes: sizes are exact, and speed does not depend on the values."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from rich.progress import Progress

from ..bundle.manifest import SCHEMA_VERSION, Manifest, PromptFile, Source
from ..bundle.memory_plan import decoder_bytes
from ..bundle.reader import DECODER, GOLDEN, MANIFEST, MODEL_CARD, PROMPT, TOKENIZER, Bundle, file_entries, staged_directory
from ..errors import BundleError
from ..export.memory_plan import plan_memory
from ..formats.model_config import CobraConfig, MambaConfig, decoder_shapes
from ..formats.package_data import MINI
from ..formats.recipe import StoredTensor, quantized_scheme, stored_tensors, uniform_recipe
from ..formats.safetensors_file import SafetensorsWriter
from ..formats.scheme import Scheme, scheme_named
from ..formats.targets import target_named
from ..inputs.text import END_OF_TEXT, PromptTemplate, TextCodec
from ..regress.golden import write_golden
from ..regress.predictions import Prediction
from ..regress.state_sketch import SKETCH_SIZE
from ..regress.top_tokens import TopTokens
from ..suite.line import Line
from ..suite.tokenized import tokenized_suite
from ..version import __version__

_SCALES = ".scales"
_DRAWN = 1 << 24  # values drawn of each kind; larger tensors repeat them from other beginnings


def random_bundle(mamba: MambaConfig, scheme: str, directory: Path, bar: Progress) -> Bundle:
    """Make a text-only bundle with random weights, once.

    Args:
        mamba: config of the decoder.
        scheme: of the weights.
        directory: of the bundle; an existing bundle of this shape and recipe is opened instead.
        bar: for progress.

    Raises:
        InputError: an unknown scheme, or one that fits no matrix; the directory is not a bundle.
        MachineError: the disk is full.
    """
    config = CobraConfig("random", None, None, mamba)
    recipe, _ = uniform_recipe(mamba, scheme_named(scheme))
    if (directory / MANIFEST).is_file():
        with suppress(BundleError):  # of another version: written again below
            found = Bundle.open(directory)
            if found.manifest.model == config and found.manifest.recipe == recipe:
                return found
    plan, shapes = stored_tensors(mamba, recipe), decoder_shapes(mamba)
    task, rng = bar.add_task(f"random decoder, {scheme}", total=len(plan)), np.random.default_rng(0)
    codes, weights = rng.integers(0, 256, _DRAWN, np.uint8), 0.02 * rng.standard_normal(_DRAWN, np.float32)
    pools = {dtype: values.astype(dtype) for dtype, values in (("uint8", codes), ("float16", weights), ("float32", weights))}
    with staged_directory(directory, force=True, needed_bytes=decoder_bytes(config, recipe)) as stage:
        with SafetensorsWriter(stage / DECODER, [t for entries in plan.values() for t in entries]) as writer:
            for name, entries in plan.items():
                for tensor in entries:
                    writer.write(tensor.name, _random(tensor, shapes[name], quantized_scheme(recipe, name), pools, rng))
                bar.advance(task)
        (stage / TOKENIZER).write_bytes((MINI / TOKENIZER).read_bytes())
        (stage / PROMPT).write_bytes(msgspec.json.encode(PromptFile(config.prompt_style, END_OF_TEXT, 0)))
        _write_golden(stage, config)
        (stage / MODEL_CARD).write_text("Random weights, for measurements only.\n", encoding="utf-8")
        manifest = Manifest(
            SCHEMA_VERSION, __version__, Source("random", "0" * 64), config, "cpu", recipe, file_entries(stage),
            plan_memory(config, recipe, target_named("cpu")), None,
        )  # fmt: skip
        (stage / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return Bundle.open(directory)


def _write_golden(stage: Path, config: CobraConfig) -> None:
    """Write one golden line with a uniform distribution, since a bundle must have golden lines."""
    mamba = config.mamba
    codec = TextCodec.open(stage / TOKENIZER, mamba.vocab)
    line, template = Line("Is it random?", "Yes", "random"), PromptTemplate(config.prompt_style)
    suite = tokenized_suite("random", [(1, line)], Path, codec, template, sees=False, skipped={})
    tokens = suite.lines[0].tokens
    uniform = np.full((len(tokens) - 1, mamba.vocab), -np.log(mamba.vocab))
    state = np.ones((mamba.n_layer, SKETCH_SIZE), np.float32)
    reading = Prediction(TopTokens.of(uniform, np.array(tokens[1:])), state, (), None)
    write_golden(stage / GOLDEN, suite, [reading], np.empty((0, 0, mamba.d_model), np.float32))


def _random(
    tensor: StoredTensor,
    shape: tuple[int, ...],
    scheme: Scheme | None,
    pools: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """Return values, of the shape and dtype of the tensor, that keep a deep decoder stable: weights of `shape` near 1/√in.

    Drawing every value would take a minute at full size, so codes and weights are taken from a pool.
    """
    if tensor.dtype == "uint8":
        return _from(pools[tensor.dtype], tensor.shape, rng)
    if tensor.name.endswith("A_log"):
        values = np.broadcast_to(np.log(np.arange(1, tensor.shape[1] + 1)), tensor.shape)
    elif tensor.name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
        values = np.ones(tensor.shape)
    elif tensor.name.endswith(_SCALES):
        assert scheme is not None
        spread = 2**scheme.weight_bits / 12**0.5  # of uniform codes
        gain = 0.5 if "out_proj" in tensor.name else 1.0  # every layer adds to the residual
        values = np.full(tensor.shape, gain * shape[1] ** -0.5 / spread)
    else:
        return _from(pools[tensor.dtype], tensor.shape, rng)
    return values.astype(tensor.dtype)


def _from(pool: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return values of a pool, from a random beginning on and around its end."""
    begin, n = int(rng.integers(len(pool))), math.prod(shape)
    first = pool[begin : begin + n]
    return np.concatenate([first, np.resize(pool, n - len(first))]).reshape(shape)
