"""The model `cobra-edge` of lmms-eval: a bundle. lmms-eval finds it by an entry point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image

from ...decode.decoder import DecoderOptions
from ...errors import InputError, MachineError
from ...inference.session_options import Opening
from ...terminal.output import progress
from .generation_args import GenerationArgs
from .model_adapter import ModelAdapter, only_image
from .task_names import require_known


class CobraEdgeLMM(lmms):
    """A bundle as a simple model of lmms-eval: text, and one image per question."""

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
            raw_prompts: use contexts as they are, without the bundle's template.
            batch_size, max_batch_size: lmms-eval passes them to every model; a session handles one request at a time.

        Raises:
            BundleError, InputError, MachineError: as `cobra_edge.load` raises them.
        """
        super().__init__()
        options = DecoderOptions(threads, activations)
        opening = Opening(Path(bundle), device, decoder_kernels, vision_runtime, options)
        self.model_adapter = ModelAdapter.open(opening, raw_prompts, batch_size)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return (loss in nats per token, is greedy) of each request's (context, continuation, location of its document).

        A loss in spite of the name: lmms-eval chooses the smallest value, because its own models return losses.
        """

        def answer(_number: int, request: Instance) -> GenerationResult:
            context, continuation, *where = request.args
            if callable(continuation):  # the task's own function of a document
                continuation = continuation(self._document(*where[1:]))
            found = self.model_adapter.loglikelihood(context, continuation, self._image(*where) if where else None)
            # lmms-eval 0.7.3 converts a bare pair to a string; a GenerationResult passes through unchanged.
            return GenerationResult((-found.log_p / max(found.n_tokens, 1), found.greedy))

        return self._each("loglikelihood", requests, answer)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request's (context, generation options, location of its document)."""

        def answer(number: int, request: Instance) -> str:
            context, options, *where = request.args
            return self.model_adapter.generate(context, GenerationArgs.of(options, number), self._image(*where))

        return self._each("generate_until", requests, answer)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise InputError: not supported."""
        raise InputError("multi-round tasks are not supported; use a task whose output_type is generate_until")

    def _document(self, number: int, task: str, split: str) -> dict[str, Any]:
        return dict(self.task_dict[task][split][number])

    def _image(
        self, visual_of: Callable[[dict[str, Any]], Any] | None, number: int, task: str, split: str
    ) -> Image.Image | None:
        """Return the image of a document. Raises InputError for several images, and for anything else than an image."""
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
    """Run tasks and return the results of lmms-eval.

    Args:
        lmm: the model.
        tasks: names of tasks, groups or tags.
        include_path: directory with further tasks.
        limit: maximum number of documents per task; None for all.
        shots: number of few-shot examples; None for what the task defines.

    Raises:
        InputError: an unknown task, or one that the model does not support.
        MachineError: the data of a task is not available.
    """
    manager = TaskManager("WARNING", None if include_path is None else str(include_path), model_name="cobra-edge")
    require_known(tasks, manager.all_tasks)
    try:
        found = simple_evaluate(lmm, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False)
    except OSError as error:
        raise MachineError(f"the data of a task is not available ({error}); check its dataset_path and the network") from error
    return dict(found)
