"""lmms-eval on a bundle: the model `cobra-edge`, which its own command finds by an entry point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image

from ...errors import InputError, MachineError
from ...terminal.output import progress
from .generation_args import GenerationArgs
from .model_adapter import ModelAdapter, only_image
from .task_names import require_known


class CobraEdgeLMM(lmms):
    """A bundle as lmms-eval's model, in its plain form: a text and one image a question."""

    is_simple = True

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
            batch_size, max_batch_size: lmms-eval hands them to every model; a session reads one question at a time.

        Raises:
            BundleError, InputError, MachineError: as `cobra_edge.load` raises them.
        """
        super().__init__()
        self.model_adapter = ModelAdapter.open(
            bundle, device, decoder_kernels, vision_runtime, threads, activations, raw_prompts, batch_size
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return (loss in nats a token, is greedy) of each request's (context, continuation, and where its document is).

        A loss where the name says a likelihood: lmms-eval takes the smallest for its choice, as its own models return losses.
        """

        def answer(_number: int, request: Instance) -> GenerationResult:
            context, continuation, *where = request.args
            if callable(continuation):  # the task's own function of a document
                continuation = continuation(self._document(*where[1:]))
            found = self.model_adapter.loglikelihood(context, continuation, self._image(*where) if where else None)
            # Bare, the pair would become a text: 0.7.3 lets only what is in a GenerationResult through as it is.
            return GenerationResult((-found.log_p / max(found.n_tokens, 1), found.greedy))

        return self._each("loglikelihood", requests, answer)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request's (context, generation options, and where its document is)."""

        def answer(number: int, request: Instance) -> str:
            context, options, *where = request.args
            return self.model_adapter.write(context, GenerationArgs.of(options, number), self._image(*where))

        return self._each("generate_until", requests, answer)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse. Raises InputError."""
        raise InputError("tasks of several rounds are not run on a bundle; take a task whose output_type is generate_until")

    def _document(self, number: int, task: str, split: str) -> dict[str, Any]:
        return dict(self.task_dict[task][split][number])

    def _image(
        self, visual_of: Callable[[dict[str, Any]], Any] | None, number: int, task: str, split: str
    ) -> Image.Image | None:
        """Return what a document shows. Raises InputError for several images, and for what is none."""
        shown = None if visual_of is None else visual_of(self._document(number, task, split))
        return only_image(shown, f"task {task}, document {number}")

    def _each(self, kind: str, requests: list[Instance], answer: Callable[[int, Instance], Any]) -> list[Any]:
        """Answer one request after the other."""
        answers = []
        with progress() as bar:
            task = bar.add_task(kind, total=len(requests))
            for number, request in enumerate(requests):
                answers.append(answer(number, request))
                bar.advance(task)
        return answers


def evaluate(
    lmm: CobraEdgeLMM, tasks: list[str], include_path: Path | None, limit: int | None, shots: int | None
) -> dict[str, Any]:
    """Run tasks; returns lmms-eval's results.

    Args:
        lmm: the model.
        tasks: names of tasks, groups or tags.
        include_path: a directory of further tasks.
        limit: how many documents of each task; None for all.
        shots: examples in front of each question; None for what the task says.

    Raises:
        InputError: an unknown task, or one that the model cannot take.
        MachineError: data of a task that cannot be had.
    """
    manager = TaskManager("WARNING", None if include_path is None else str(include_path), model_name="cobra-edge")
    require_known(tasks, manager.all_tasks)
    try:
        found = simple_evaluate(lmm, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False)
    except OSError as error:
        raise MachineError(f"data of a task cannot be had ({error}); check its dataset_path and the network") from error
    return dict(found)
