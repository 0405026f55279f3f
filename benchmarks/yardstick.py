"""The common yardstick: how well each estimator tells good rows from damaged ones, over the steps of the pilot.

python -m benchmarks.yardstick [--models tiny SmolLM2-135M-Instruct] [--tasks quality safety] [--seeds 0 1]

One run per model, task and seed: pilots of several lengths, which score the same rows: area under the ROC curve per
kind of damage, and FLOPs of scoring a row over those of a forward and backward. Results go to
`benchmarks/results/yardstick`; `python -m benchmarks.report` makes the tables.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import machine, versions
from benchmarks.tiny import pretrained_tiny_model
from trl_bilevel.demo.comparison import ranking_quality
from trl_bilevel.demo.experiment import budget_of, make_trainer
from trl_bilevel.demo.tasks import make_task
from trl_bilevel.weights.language_model import LanguageModel, left_as_it_was
from trl_bilevel.weights.pilot import BATCH_ROWS, BATCH_TOKENS, Pilot, PilotRecipe
from trl_bilevel.weights.settings import ESTIMATORS, PILOT_LEARNING_RATE

FOLDER = Path(__file__).parent / "results" / "yardstick"
SMOLLM2 = "SmolLM2-135M-Instruct"
# Pilot steps after which rows are scored; the real model takes minutes for each.
STEPS: dict[str, tuple[int, ...]] = {"tiny": (6, 12, 24, 48), SMOLLM2: (12, 24)}
ROWS = 192
Scores = Callable[[Any], Tensor]


def signals(pilot: Pilot, model: LanguageModel) -> Iterator[tuple[str, Scores]]:
    """What scores a batch of rows, `[b]`, by name."""
    yield pilot.recipe.estimator, lambda batch: pilot.scores(batch)[:, 0]
    if pilot.recipe.estimator == "value_function":

        def negative_loss(batch: Any) -> Tensor:
            with pilot.pulled.added():
                return -model.row_losses(batch).means().cpu()

        yield "loss", negative_loss


def count(work: Callable[[Any], Any], batch: Any) -> float:
    """FLOPs of a batch."""
    # On a GPU the LM head adds products up in fp32, `addmm` with a dtype in a place that torch's counter trips on.
    mapping = {torch.ops.aten.addmm: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work(batch)
    return counter.get_total_flops()


def addmm_flops(added: torch.Size, left: torch.Size, right: torch.Size, *rest: Any, **more: Any) -> int:
    """FLOPs of `added + left @ right`, whatever else is given."""
    return 2 * left[0] * left[1] * right[1]


def measure(name_of_model: str, name: str, seed: int) -> dict:
    task = make_task(name, seed)
    folder = None if name_of_model == SMOLLM2 else pretrained_tiny_model()
    trainer, _ = make_trainer(
        "bilevel", task, seed=seed, budget=budget_of(name), model=folder, output_dir=tempfile.mkdtemp()
    )
    model, rows = LanguageModel(trainer.model), trainer.rows
    pulling, _ = trainer.trusted.split(seed)
    places = rows.order(seed)[:ROWS].tolist()
    batches = [rows.batch(part) for part in rows.batches(places, BATCH_TOKENS, BATCH_ROWS)]
    kinds = [task.train["kind"][row] for batch in batches for row in batch["sample_id"].tolist()]
    found: dict[int, dict[str, dict[str, float]]] = {}
    flops: dict[str, float] = {}
    training = count(lambda batch: model.row_losses(batch).sums.sum().backward(), batches[0])
    trainer.model.zero_grad()
    with left_as_it_was(trainer.model):
        for steps in STEPS[name_of_model]:
            found[steps] = {}
            for estimator in ESTIMATORS:
                pilot = Pilot(model, PilotRecipe(estimator, steps, PILOT_LEARNING_RATE, seed))
                pilot.train(rows, pulling)
                with torch.no_grad():
                    for signal, score in signals(pilot, model):
                        flops.setdefault(signal, count(score, batches[0]))
                        scores = torch.cat([score(batch) for batch in batches])
                        found[steps][signal] = ranking_quality(scores.tolist(), kinds)
    return {
        "model": name_of_model,
        "task": name,
        "seed": seed,
        "rows": ROWS,
        "auc": found,
        "scoring_cost": {signal: round(each / training, 3) for signal, each in flops.items()},
        "versions": versions(),
        "machine": machine(),
    }


def jobs(models: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    for seed in seeds:
        for model in models:
            for name in tasks:
                yield Job(FOLDER / f"{model}-{name}-seed{seed}.json", measure, (model, name, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--tasks", nargs="*", default=["quality", "safety", "boilerplate"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    add_arguments(parser)
    options = parser.parse_args()
    run_jobs(jobs(options.models, options.tasks, options.seeds), options)


if __name__ == "__main__":
    main()
