"""The effect of each precision of the vision graph on cobra-mini's answers, with an unquantized decoder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from msgspec import structs

from cobra_edge.bench.vision_towers import TRAINED, config_of, tower
from cobra_edge.bench.written_graph import facts
from cobra_edge.bundle.reader import VISION, Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.decode.decoder import Decoder
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.session import Session
from cobra_edge.inputs.image import ImageTransform, load_image
from cobra_edge.regress.answer_logits import answer_logits, look_at
from cobra_edge.regress.budget import read_budget
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.suite.tokenized import TokenizedSuite
from cobra_edge.vision.graph.emulation import open_emulated

from .held_out import Answers, figures
from .quality_comparison import embedded_suite
from .vision_goals import VisionAnswers


def measure_answers(graphs: Sequence[Path], on_step: Callable[[str], None]) -> list[VisionAnswers]:
    """Evaluate the held-out suite with the embeddings of each graph and those of torch, with the same decoder.

    Args:
        graphs: directories written by `vision_towers` for cobra-mini; 16-bit ones are emulated as a GPU computes them.
        on_step: called with the current step.

    Returns:
        One row per graph, compared with torch's embeddings.
    """
    on_step("answers with torch's embeddings")
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(
            "mini",
            target_named("cpu"),
            Path(folder) / "bundle",
            scheme="fp16",
            method="rtn",
            vision_precision="fp32",
            golden_lines=2,
        )
        session = Session(Bundle.open(bundle.directory))
        suite = embedded_suite(session, read_suite(HELDOUT))
        decoder = open_decoder(session.bundle)
        files = LineSet.of_suite(HELDOUT).images()
        reference = answer(decoder, replace(suite, embeddings=_by_torch(files)))
        truth = Answers.of(reference, reference, suite)
        rows = []
        for directory in graphs:
            config, graph = facts(directory)
            on_step(f"answers with {graph.precision}")
            runner = open_emulated(directory / VISION, config, graph)
            transform = ImageTransform.of(config, graph.input)
            embeddings = np.stack([runner.embed(transform.pixels(load_image(file))) for file in files])
            found = Answers.of(answer(decoder, replace(suite, embeddings=embeddings)), reference, suite)
            allowed = read_budget().vision[graph.precision].get("kld_mean")
            limit = None if allowed is None else allowed.max
            drift = structs.asdict(figures(found, truth, suite))
            rows.append(VisionAnswers(precision=graph.precision, runtime=runner.name, kld_mean_max=limit, **drift))
    return rows


def answer(decoder: Decoder, suite: TokenizedSuite) -> list[np.ndarray]:
    """Return the logits of each line's answer, (n, vocab) float32; every image is prefilled once."""
    assert suite.embeddings is not None
    return list(answer_logits(decoder, suite.lines, look_at(decoder, suite.embeddings)))


@torch.inference_mode()
def _by_torch(files: Sequence[Path]) -> np.ndarray:
    """Return the float model's embeddings (images, n_visual_tokens, d_model) float32."""
    model, transform = tower(TRAINED), ImageTransform.of(config_of(TRAINED))
    return np.stack([model(torch.from_numpy(transform.pixels(load_image(file))))[0].numpy() for file in files])
