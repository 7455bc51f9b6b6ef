"""Attribution: the drift with only one part of the build in the baseline, for parts, decoder layers and tensors.

The figures need not add up to the whole: errors of one part can mask those of another. A part that a baseline does not allow to
measure has the reason as its note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..decode.backends import open_decoder, open_weights
from ..decode.decoder import Decoder, DecoderOptions, DecoderState, Weights
from ..environment.available_memory import require_memory
from ..environment.requirements import install_hint
from ..errors import CobraEdgeError
from ..formats.packing import QuantizedTensor
from ..formats.scheme import SCHEMES
from ..inference.session import Session
from ..inputs.image import load_image
from ..suite.tokenized import TokenizedLine, TokenizedSuite
from .baseline import Reference
from .float_tensors import Tensors, dense, float_tensors
from .metrics import divergence, log_softmax
from .predictions import Prediction
from .report import Attribution, Part
from .top_tokens import TopTokens

_WORST_LAYERS = 3  # whose tensors are tested in models with more than _FEW_LAYERS
_FEW_LAYERS = 8
_MAX_TENSORS = 12  # of the report, the worst

Embeddings = Sequence[np.ndarray | None]  # (n_visual_tokens, d_model) float32 of each line, None without an image


@dataclass(frozen=True, eq=False)
class _PartEvaluation:
    """Lines on which parts are evaluated, and the baseline's predictions of them."""

    suite: TokenizedSuite
    references: Sequence[Prediction]

    def part(self, name: str, decoder: Decoder, embeddings: Embeddings, note: str = "") -> Part:
        """Return the drift of a decoder with these embeddings, over the answer tokens."""
        klds, agrees = list[np.ndarray](), list[np.ndarray]()
        looked: tuple[int | None, DecoderState] = None, decoder.new_state()
        for tokenized, reference, visual in zip(self.suite.lines, self.references, embeddings, strict=True):
            if tokenized.image != looked[0]:
                state = decoder.new_state()
                if visual is not None:
                    decoder.prefill(visual, state)
                looked = tokenized.image, state
            logits = decoder.forward(decoder.embed(tokenized.tokens[:-1]), looked[1].copy())
            found = log_softmax(logits[len(tokenized.prompt) - 1 :])
            kld, most_probable = _compare(reference, tokenized, found)
            klds.append(kld)
            agrees.append(found.argmax(-1) == most_probable)
        return Part(name, float(np.concatenate(klds).mean()), float(np.concatenate(agrees).mean()), note)


def _compare(reference: Prediction, tokenized: TokenizedLine, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = len(tokenized.prompt) - 1
    if isinstance(reference.log_probs, TopTokens):
        top = reference.log_probs.part(first, len(reference.log_probs))
        return top.divergence_of(found), top.most_probable()
    return divergence(reference.log_probs[first:], found), reference.log_probs[first:].argmax(-1)


def attribution(
    session: Session,
    reference: Reference,
    suite: TokenizedSuite,
    options: DecoderOptions,
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Attribution:
    """Return the drift with only one part of the build in the baseline, for each part.

    Args:
        session: the opened build.
        reference: the opened baseline.
        suite: a few lines, on which every part is evaluated.
        options: of the build's decoder.
        on_step: called with the name of a stage, how much of it is done, and how much there is.
    """
    evaluation = _PartEvaluation(suite, list(reference.predictions(suite, 0)))
    right = [prediction.embeddings for prediction in evaluation.references]
    images = {tokenized.image for tokenized in suite.lines if tokenized.image is not None}
    on_step("attribution, parts", 0, 1)
    by_image = {image: session.visual_embeddings(suite.load(image)) for image in images}
    own = [None if tokenized.image is None else by_image[tokenized.image] for tokenized in suite.lines]
    parts = [evaluation.part("everything", session.decoder, own), evaluation.part("decoder", session.decoder, right)]
    if session.decoder.activations == "int8":
        unrounded = replace(options, activations="float32")
        wide = open_decoder(session.bundle, session.decoder.runs_on, session.decoder.name, unrounded)
        parts.append(evaluation.part("decoder, float activations", wide, right))
    with ExitStack() as stack:
        decoder, tensors, why = _float_decoder(session, reference)
        if images:
            parts += _vision_parts(evaluation, session, reference, decoder, why, own, stack)
        if decoder is None or tensors is None:
            return Attribution(len(suite.lines), (*parts, Part("layers and tensors", None, None, why)))
        layers, worst = _inside(evaluation, session, tensors, right, options, on_step)
    return Attribution(len(suite.lines), tuple(parts), layers, worst)


def _float_decoder(session: Session, reference: Reference) -> tuple[Decoder | None, dict[str, np.ndarray] | None, str]:
    """Return the decoder of the baseline and its tensors in the form of the build's, None and a reason if there are none."""
    manifest = session.bundle.manifest
    if reference.golden is not None:
        return None, None, "golden lines contain no weights; give --baseline with the checkpoint or an fp16 bundle"
    if reference.session is not None:
        recipe, held = reference.session.bundle.manifest.recipe, reference.session.bundle.decoder_tensors()
        if recipe.rotations or recipe.method.startswith("awq"):
            decoder = reference.session.decoder
            return (
                decoder,
                None,
                "the baseline is rotated or scaled; give --baseline with the checkpoint or a plain fp16 bundle",
            )
        source: Callable[[str], np.ndarray] = lambda name: dense(held[name])  # noqa: E731
    else:
        weights = reference.checkpoint.decoder
        source = lambda name: weights[name].float().numpy()  # noqa: E731
    try:
        require_memory(4 * manifest.model.mamba.n_parameters, "a float decoder beside the build")
    except CobraEdgeError as error:
        return (None if reference.session is None else reference.session.decoder), None, str(error)
    tensors = float_tensors(session.bundle, session.bundle.decoder_tensors(), source)
    return _opened(session, tensors, DecoderOptions(activations="float32")), tensors, ""


def _opened(session: Session, tensors: Tensors | dict[str, np.ndarray], options: DecoderOptions) -> Decoder:
    manifest = session.bundle.manifest
    return open_weights(Weights(manifest.model.mamba, manifest.recipe, tensors, "weights in memory"), options)


def _vision_parts(
    evaluation: _PartEvaluation,
    session: Session,
    reference: Reference,
    decoder: Decoder | None,
    why: str,
    embeddings: Embeddings,
    stack: ExitStack,
) -> Iterator[Part]:
    """Yield the drift of vision tower and projector, together and alone."""
    together = "vision tower and projector"
    if decoder is None:
        yield Part(together, None, None, why)
        return
    yield evaluation.part(together, decoder, embeddings)
    try:
        from ..vision.graph.split import open_split

        build = stack.enter_context(open_split(session.bundle))
        float_features, float_projected = _float_split(reference, stack)
    except ImportError as error:
        yield Part(
            "vision tower", None, None, f"splitting the graph needs {error.name}; install it with: {install_hint('export')}"
        )
        return
    except CobraEdgeError as error:
        yield Part("vision tower", None, None, str(error))
        return
    transform = session.bundle.image()
    towers, projectors = dict[int, np.ndarray](), dict[int, np.ndarray]()
    for image in {tokenized.image for tokenized in evaluation.suite.lines if tokenized.image is not None}:
        loaded = load_image(evaluation.suite.load(image))
        towers[image] = float_projected(build.features(transform.pixels(loaded)))
        projectors[image] = build.projected(float_features(loaded))
    note = "vision tower and projector by onnxruntime, CPU"
    for name, found in (("vision tower", towers), ("projector", projectors)):
        given = [None if tokenized.image is None else found[tokenized.image] for tokenized in evaluation.suite.lines]
        yield evaluation.part(name, decoder, given, note)


def _float_split(reference: Reference, stack: ExitStack) -> tuple[Callable[[Any], list[np.ndarray]], Any]:
    """Return the vision tower of the baseline, image to features (1, n_patches, embed_dim), and its projector."""
    if reference.session is not None:
        from ..vision.graph.split import open_split

        split = stack.enter_context(open_split(reference.session.bundle))
        transform = reference.session.bundle.image()
        return lambda image: split.features(transform.pixels(image)), split.projected
    import torch

    from ..inputs.image import ImageTransform
    from ..model.cobra import load_vision

    model, pixels = load_vision(reference.checkpoint), ImageTransform.of(reference.checkpoint.config)
    tower: Any = model.tower

    @torch.inference_mode()
    def features(image: Any) -> list[np.ndarray]:
        parts = torch.from_numpy(pixels.pixels(image)).chunk(len(tower.encoders), dim=1)
        return [encoder(part).numpy() for encoder, part in zip(tower.encoders, parts, strict=True)]

    @torch.inference_mode()
    def projected(found: Sequence[np.ndarray]) -> np.ndarray:
        embeddings: np.ndarray = model.projector(torch.cat([torch.from_numpy(f) for f in found], dim=-1))[0].numpy()
        return embeddings

    return features, projected


def _inside(
    evaluation: _PartEvaluation,
    session: Session,
    floats: dict[str, np.ndarray],
    embeddings: Embeddings,
    options: DecoderOptions,
    on_step: Callable[[str, int, int], None],
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Return the drift of each layer alone and of single tensors, worst first."""
    held, n_layer = session.bundle.decoder_tensors(), session.config.mamba.n_layer

    def alone(label: str, names: Sequence[str]) -> Part:
        return evaluation.part(
            label, _opened(session, floats | {name: _runnable(held[name]) for name in names}, options), embeddings
        )

    layers = []
    for index in range(n_layer):
        on_step("attribution, layers", index, n_layer)
        layers.append(alone(f"layer {index}", [name for name in held if name.startswith(f"backbone.layers.{index}.")]))
    layers.sort(key=lambda part: -(part.kld_mean or 0.0))
    worst = layers if n_layer <= _FEW_LAYERS else layers[:_WORST_LAYERS]
    inside = tuple(f"backbone.layers.{part.name.removeprefix('layer ')}." for part in worst)
    names = [
        name
        for name, value in held.items()
        if (name.startswith(inside) or not name.startswith("backbone.layers.")) and not _is_float32(value)
    ]
    tensors = []
    for done, name in enumerate(names):
        on_step("attribution, tensors", done, len(names))
        tensors.append(alone(name, [name]))
    tensors.sort(key=lambda part: -(part.kld_mean or 0.0))
    return tuple(layers), tuple(tensors[:_MAX_TENSORS])


def _is_float32(value: np.ndarray | QuantizedTensor) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float32


def _runnable(value: np.ndarray | QuantizedTensor) -> np.ndarray | QuantizedTensor:
    """Return a tensor that our own kernels support: codes of bitsandbytes are dequantized."""
    return dense(value) if isinstance(value, QuantizedTensor) and SCHEMES[value.scheme.name].code_format != "int" else value
