"""The model `cobra-edge` of EleutherAI's lm-evaluation-harness: a bundle.

Importing this module registers the model. lm-eval (0.4.13) has no plug-ins, so its own command does not know the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from PIL import Image

from ...decode.decoder import DecoderOptions
from ...errors import InputError, MachineError
from ...inference.session_options import Opening
from ...terminal.output import progress
from .generation_args import GenerationArgs
from .model_adapter import ModelAdapter, only_image
from .task_names import require_known


@register_model("cobra-edge")
class CobraEdgeLM(LM):
    """A bundle as a model of lm-eval: text, and one image per question if the bundle has a vision encoder."""

    MULTIMODAL = True

    def __init__(
        self,
        bundle: str | Path,
        device: str = "auto",
        decoder_kernels: str = "auto",
        vision_runtime: str = "auto",
        threads: int | None = None,
        activations: str | None = None,
        raw_prompts: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        """Open a bundle.

        Args:
            bundle, device, decoder_kernels, vision_runtime, threads, activations: as for `cobra_edge.load`.
            raw_prompts: use contexts as they are, without the bundle's template.
            batch_size, max_batch_size: lm-eval passes them to every model; a session handles one request at a time.

        Raises:
            BundleError, InputError, MachineError: as `cobra_edge.load` raises them.
        """
        super().__init__()
        options = DecoderOptions(threads, activations)
        opening = Opening(Path(bundle), device, decoder_kernels, vision_runtime, options)
        self.model_adapter = ModelAdapter.open(opening, raw_prompts, batch_size)

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches contexts."""
        return str(self.model_adapter.session.config.model_id)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raise InputError: the template of the bundle is already applied to every question."""
        raise InputError("the template of the bundle is applied to every question; leave apply_chat_template off")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log p in nats, is greedy) of each request's (context, continuation, optional images)."""

        def answer(_number: int, request: Instance) -> tuple[float, bool]:
            context, continuation, *more = request.args
            likelihood = self.model_adapter.loglikelihood(context, continuation, _image_of(request, more))
            return likelihood.log_p, likelihood.greedy

        return self._each("loglikelihood", requests, answer)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return log p in nats of each request's text after an end token, in windows of the model's maximum length."""

        def answer(_number: int, request: Instance) -> float:
            text, *more = request.args
            if _image_of(request, more) is not None:
                raise InputError(
                    f"task {request.task_name}: loglikelihood_rolling supports no image; use a task without images"
                )
            codec, length = self.model_adapter.session.codec, self.model_adapter.session.config.max_length
            windows = get_rolling_token_windows(codec.encode(text), codec.end_id, length, 1)
            return self.model_adapter.rolling([make_disjoint_window(window) for window in windows])

        return self._each("loglikelihood_rolling", requests, answer)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request's (context, generation options, optional images)."""

        def answer(number: int, request: Instance) -> str:
            context, options, *more = request.args
            return self.model_adapter.generate(context, GenerationArgs.of(options, number), _image_of(request, more))

        return self._each("generate_until", requests, answer)

    def _each(self, kind: str, requests: list[Instance], answer: Callable[[int, Instance], Any]) -> list[Any]:
        """Answer one request after the other, and add the answers to lm-eval's cache."""
        answers = []
        with progress() as bar:
            task = bar.add_task(kind, total=len(requests))
            for number, request in enumerate(requests):
                answers.append(answer(number, request))
                self.cache_hook.add_partial(kind, request.args, answers[-1])
                bar.advance(task)
        return answers


def _image_of(request: Instance, more: list[dict[str, Any]]) -> Image.Image | None:
    """Return the image of a request. Raises InputError for several images, and for anything else than an image."""
    shown = more[0] if more else {}
    where = f"task {request.task_name}, document {request.doc_id}"
    if other := set(shown) - {"visual"}:
        raise InputError(f"{where} contains {', '.join(sorted(other))}; the model accepts text and one image")
    return only_image(shown.get("visual"), where)


def evaluate(
    lm: CobraEdgeLM, tasks: list[str], include_path: Path | None, limit: int | None, shots: int | None
) -> dict[str, Any]:
    """Run tasks and return the results of lm-eval.

    Args:
        lm: the model.
        tasks: names of tasks, groups or tags.
        include_path: directory with further tasks.
        limit: maximum number of documents per task; None for all.
        shots: number of few-shot examples; None for what the task defines.

    Raises:
        InputError: an unknown task, or one that the model does not support.
        MachineError: the data of a task is not available.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    require_known(tasks, manager.all_tasks)
    try:
        found = simple_evaluate(
            lm, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False, batch_size=1
        )
    except OSError as error:
        raise MachineError(f"the data of a task is not available ({error}); check its dataset_path and the network") from error
    assert found is not None  # None is for other processes than the first
    return dict(found)
