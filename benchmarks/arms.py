"""Arms beside those of the demo: baselines that keep a part of the rows, and controls of the rounds.

Each is an arm of the demo on other rows or with other settings, at the same number of steps.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import concatenate_datasets
from torch import Tensor

from trl_bilevel import SelfRefineTrainer
from trl_bilevel.demo import experiment
from trl_bilevel.demo.experiment import Budget, Result, make_trainer
from trl_bilevel.demo.tasks import Task

ARMS = experiment.ARMS | {
    "validation_only": "only the validation rows",
    "trusted_once": "all rows and the validation rows, equal weights",
    "trusted_thrice": "all rows and the validation rows three times, equal weights",
    "bilevel_trusted": "the weights of bilevel, and each validation row three times as often as the best rows",
    "random_subset": "a random quarter of the rows",
    "perplexity": "the rows that the untrained model finds likeliest, as many as are undamaged (needs that number)",
    "seal_two_stage": "the four fifths of the rows that `seal` weighs most, from the start: twice the steps",
    "bilevel_double": "as bilevel, with twice the rows per step: as many as refine trains on",
    "refine_random": "as refine, but the responses' scores are dealt out at random",
    "refine_best": "as refine, but all weight goes to the best response of each question",
}
# Those that train on rows that were chosen from all rows before.
FILTERS = ("random_subset", "perplexity", "seal_two_stage")
REFINING = ("refine", "refine_random", "refine_best")
# How often a validation row is there, beside rows of equal weight.
ADDED = {"trusted_once": 1, "trusted_thrice": 3}
# How often a validation row is seen for each time that a row of the largest weight is.
TRUSTED_FACTOR = 3


class RandomWeights(SelfRefineTrainer):
    """The same scores, dealt out to other responses of the same question."""

    def _score_responses(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
        scores = super()._score_responses(prompt_ids, completion_ids).view(-1, self.args.num_generations)
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        return scores.gather(1, torch.rand(scores.shape, generator=generator).argsort(1)).flatten()


def run_arm(
    arm: str,
    task: Task,
    *,
    budget: Budget,
    keep: Sequence[int] | None = None,
    choosing_seconds: float = 0.0,
    **settings: Any,
) -> Result:
    """Train one arm and measure it.

    Args:
        arm: one of `ARMS`; any name if `keep` is given.
        task, budget, settings: as for `trl_bilevel.demo.experiment.run_arm`.
        keep: the rows to train on, chosen elsewhere.
        choosing_seconds: wall time that their choice took; part of the result's.
    """
    start = time.perf_counter() - choosing_seconds
    if arm in FILTERS:
        keep = chosen_rows(arm, task, budget=budget, **settings)
    choosing_seconds = time.perf_counter() - start
    known, changes = arm, {}
    if keep is not None or arm == "validation_only":
        known = "uniform"
        # As many steps as with all rows.
        changes = {"max_steps": round(budget.epochs * len(task.train) / budget.batch_size)}
        task = replace(task, train=kept_rows(task, keep))
    elif arm in ADDED:
        known = "uniform"
        changes = {"max_steps": round(budget.epochs * len(task.train) / budget.batch_size)}
        task = replace(task, train=concatenate_datasets([task.train, *[kept_rows(task, None)] * ADDED[arm]]))
    elif arm == "bilevel_trusted":
        known, weights = "bilevel", settings["weights"]
        changes = {"max_steps": round(budget.epochs * len(task.train) / budget.batch_size)}
        trusted = [TRUSTED_FACTOR * max(weights)] * len(task.validation)
        settings["weights"] = [*weights, *trusted]
        task = replace(task, train=concatenate_datasets([task.train, kept_rows(task, None)]))
    elif arm == "bilevel_double":
        known, changes = "bilevel", {"per_device_train_batch_size": 2 * budget.batch_size}
    elif arm in REFINING:
        known = "refine"
        if arm == "refine_best":
            budget = replace(budget, refining=budget.refining | {"implicit_weight_temperature": 1e-4})
        elif arm == "refine_random":
            settings["refiner"] = RandomWeights
    budget = replace(budget, overrides=budget.overrides | changes)
    if arm == "validation_only":
        budget.validation_loss_weight = 0.0
    result = experiment.run_arm(known, task, budget=budget, **settings)
    return replace(result, arm=arm, seconds=result.seconds + choosing_seconds)


def kept_rows(task: Task, keep: Sequence[int] | None) -> Any:
    """The training rows of these numbers, in their order; the validation rows without."""
    if keep is not None:
        return task.train.select(sorted(keep))
    return task.validation.add_column("kind", ["good"] * len(task.validation))


def chosen_rows(arm: str, task: Task, **settings: Any) -> list[int]:
    """Rows that a filter keeps, two of them by a run of its own (arguments as for `make_trainer`)."""
    count = len(task.train)
    if arm == "random_subset":
        generator = torch.Generator().manual_seed(settings["seed"])
        return torch.randperm(count, generator=generator)[: count // 4].tolist()
    with tempfile.TemporaryDirectory() as folder:
        chooser = "uniform" if arm == "perplexity" else "seal"
        first, _ = make_trainer(chooser, task, **(settings | {"output_dir": folder}))
        if arm == "perplexity":
            scores, count = -first.row_losses(task.train.remove_columns("kind")), sum(task.good)
        else:
            first.train()
            scores, count = first.sample_weights(), round(0.8 * count)
    return scores.topk(count).indices.tolist()
