"""EleutherAI's lm-evaluation-harness on a bundle: the model `cobra-edge`.

Importing this module registers the model. lm-eval (0.4.13) looks for plug-ins nowhere, so its own command does not know it.
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

from ...errors import InputError, MachineError
from ...terminal.output import progress
from .generation_args import GenerationArgs
from .model_adapter import ModelAdapter, only_image
from .task_names import require_known


@register_model("cobra-edge")
class CobraEdgeLM(LM):
    """A bundle as lm-eval's model. It looks at one image a question, where the bundle has eyes."""

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
            raw_prompts: read contexts as they are instead of wording them by the bundle's template.
            batch_size, max_batch_size: lm-eval hands them to every model; a session reads one question at a time.

        Raises:
            BundleError, InputError, MachineError: as `cobra_edge.load` raises them.
        """
        super().__init__()
        self.model_adapter = ModelAdapter.open(
            bundle, device, decoder_kernels, vision_runtime, threads, activations, raw_prompts, batch_size
        )

    @property
    def tokenizer_name(self) -> str:
        """The name that lm-eval keeps contexts under."""
        return str(self.model_adapter.session.config.model_id)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuse: the template of the bundle already words every question. Raises InputError."""
        raise InputError("the bundle's own template words every question; leave apply_chat_template off")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log p in nats, is greedy) of each request's (context, continuation, maybe what is seen)."""

        def answer(_number: int, request: Instance) -> tuple[float, bool]:
            context, continuation, *more = request.args
            likelihood = self.model_adapter.loglikelihood(context, continuation, _image_of(request, more))
            return likelihood.log_p, likelihood.greedy

        return self._each("loglikelihood", requests, answer)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return log p (nats) of each request's text, the end token in front of it, in windows of the model's length."""

        def answer(_number: int, request: Instance) -> float:
            text, *more = request.args
            if _image_of(request, more) is not None:
                raise InputError(f"task {request.task_name}: the likelihood of a text after an image is not rolling; no image")
            codec, length = self.model_adapter.session.codec, self.model_adapter.session.config.max_length
            windows = get_rolling_token_windows(codec.encode(text), codec.end_id, length, 1)
            return self.model_adapter.rolling([make_disjoint_window(window) for window in windows])

        return self._each("loglikelihood_rolling", requests, answer)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request's (context, generation options, maybe what is seen)."""

        def answer(number: int, request: Instance) -> str:
            context, options, *more = request.args
            return self.model_adapter.write(context, GenerationArgs.of(options, number), _image_of(request, more))

        return self._each("generate_until", requests, answer)

    def _each(self, kind: str, requests: list[Instance], answer: Callable[[int, Instance], Any]) -> list[Any]:
        """Answer one request after the other; what was answered is kept where lm-eval keeps answers."""
        answers = []
        with progress() as bar:
            task = bar.add_task(kind, total=len(requests))
            for number, request in enumerate(requests):
                answers.append(answer(number, request))
                self.cache_hook.add_partial(kind, request.args, answers[-1])
                bar.advance(task)
        return answers


def _image_of(request: Instance, more: list[dict[str, Any]]) -> Image.Image | None:
    """Return what a request shows. Raises InputError for several images, and for what is none."""
    shown = more[0] if more else {}
    where = f"task {request.task_name}, document {request.doc_id}"
    if other := set(shown) - {"visual"}:
        raise InputError(f"{where} comes with {', '.join(sorted(other))}; the model takes text and one image")
    return only_image(shown.get("visual"), where)


def evaluate(
    lm: CobraEdgeLM, tasks: list[str], include_path: Path | None, limit: int | None, shots: int | None
) -> dict[str, Any]:
    """Run tasks; returns lm-eval's results.

    Args:
        lm: the model.
        tasks: names of tasks, groups or tags.
        include_path: a directory of further tasks.
        limit: how many documents of each task; None for all.
        shots: examples in front of each question; None for what the task says.

    Raises:
        InputError: an unknown task, or one that the model cannot take.
        MachineError: data of a task that cannot be had.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    require_known(tasks, manager.all_tasks)
    try:
        found = simple_evaluate(
            lm, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False, batch_size=1
        )
    except OSError as error:
        raise MachineError(f"data of a task cannot be had ({error}); check its dataset_path and the network") from error
    assert found is not None  # None is for other processes than the first
    return dict(found)
