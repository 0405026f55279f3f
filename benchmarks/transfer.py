"""Weights that a small model has learned, given to a bigger one.

python -m benchmarks.transfer [--tasks boilerplate quality] [--seeds 0] [--jobs 1]

The tiny model (`benchmarks/tiny.py`: four layers, width 128, another tokenizer) learns the weights, which go to
SmolLM2-135M-Instruct as fixed ones. Results go to `benchmarks/results/transfer`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import HERE, provenance
from benchmarks.tiny import pretrained_tiny_model
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import Budget, make_trainer, run_arm
from trl_bilevel.demo.tasks import Task, make_task

FOLDER = HERE / "results" / "transfer"
TASKS = ("boilerplate", "quality")


def tiny_weights(task: Task, seed: int, budget: Budget) -> tuple[list[float], float]:
    """Weights of the training rows by the tiny model, and the seconds that it took."""
    folder = pretrained_tiny_model()
    settings = asdict(budget) | {"lora_layers": 0}
    start = time.perf_counter()
    trainer, _ = make_trainer(
        "bilevel", task, seed=seed, budget=Budget(**settings), model=folder, output_dir=tempfile.mkdtemp()
    )
    trainer.choose_weights()
    return trainer.sample_weights().tolist(), time.perf_counter() - start


def measure(name: str, seed: int) -> dict:
    experiment = json.loads((HERE / "experiments" / f"{name}.json").read_text())
    task, budget = make_task(experiment["task"], seed), Budget(**experiment["budget"])
    weights, seconds = tiny_weights(task, seed, budget)
    kinds = task.train["kind"][:]
    result = run_arm("bilevel", task, seed=seed, budget=budget, weights=weights)
    return {
        "task": name,
        "seed": seed,
        "test_loss": result.test_loss,
        "auc": ranking_quality(weights, kinds),
        "good_share": good_share(weights, kinds),
        "seconds_of_tiny": round(seconds, 1),
        "train_steps": result.train_steps,
        **provenance(),
    }


def jobs(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    for seed in seeds:
        for task in tasks:
            yield Job(FOLDER / f"{task}-seed{seed}.json", measure, (task, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    add_arguments(parser)
    options = parser.parse_args()
    run_jobs(jobs(options.tasks, options.seeds), options)


if __name__ == "__main__":
    main()
