"""Optional: tasks of EleutherAI's lm-evaluation-harness on a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from .models import Settings


def harness(
    tasks: Sequence[str], settings: Settings, *, limit: int | None = None, folder: str | None = None
) -> Callable[[Any, Any], dict[str, Any]]:
    """What runs the tasks on a model: `harness(...)(model, tokenizer)`.

    Args:
        tasks (`list[str]`): names of tasks or groups.
        settings (`Settings`): batch size and seed.
        limit (`int`, *optional*): rows per task; all by default.
        folder (`str`, *optional*): folder with task files of your own.

    Raises:
        RuntimeError: if the package is not installed.
    """
    if find_spec("lm_eval") is None:
        raise RuntimeError(
            "`lm_eval_tasks` needs the package lm-eval: pip install 'trl-bilevel[lm-eval]', or leave the option out."
        )

    def run(model: Any, tokenizer: Any) -> dict[str, Any]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
            tasks=list(tasks),
            task_manager=TaskManager(include_path=folder),
            limit=limit,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            bootstrap_iters=1_000,
            log_samples=False,
        )
        # The figures with their standard errors, as the harness names them, and the rows they are of.
        return {"results": found["results"], "rows": found.get("n-samples", {}), "versions": found.get("versions", {})}

    return run
