"""Weights at the size at which people train: 20,000 rows of text that any machine has, 64 trusted rows.

python -m benchmarks.large [mixed shifted natural] [--rows 20000] [--seeds 0 1 2] [--estimators probe fast]
                           [--train uniform bilevel clean_only trusted_thrice]

On SmolLM2-135M-Instruct. Without `--train` the weights alone, which a CPU has in minutes; with it, one epoch of each
arm, for a GPU. Results go to `benchmarks/results/large`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.docstrings import large_task
from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import provenance
from trl_bilevel import learn_weights
from trl_bilevel.data.assets import model_folder
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import Budget, model_dtype

FOLDER = Path(__file__).parent / "results" / "large"
TASKS = ("mixed", "shifted", "natural")
ESTIMATORS: dict[str, dict[str, Any]] = {
    "probe": {},
    "fast": {"selector_preset": "fast"},
    "pilot": {"weight_estimator": "value_function"},
    "both": {"selector_preset": "reliable"},
}
BUDGET = {"epochs": 1.0, "batch_size": 32, "learning_rate": 5e-4}


def weigh(name: str, rows: int, seed: int, estimator: str) -> dict[str, Any]:
    """Weights of a task, and how good they are."""
    task, start = large_task(name, rows, seed), time.perf_counter()
    found = learn_weights(
        str(model_folder()),
        task.train.remove_columns("kind"),
        task.validation,
        seed=seed,
        model_init_kwargs={"dtype": model_dtype()},
        **ESTIMATORS[estimator],
    )
    weights, kinds = found.values.tolist(), task.train["kind"]
    record = {"task": name, "rows": rows, "seed": seed, "estimator": estimator, "facts": found.facts}
    record |= {"seconds": time.perf_counter() - start, **provenance()}
    if name != "natural":
        record |= {"auc": ranking_quality(weights, kinds), "good_share": good_share(weights, kinds)}
    else:
        # There is no truth, so a person can look.
        order = sorted(range(len(weights)), key=lambda row: -weights[row])
        record["heaviest"], record["lightest"] = ([task.train[n] for n in part] for part in (order[:20], order[-20:]))
    return record


def train(name: str, rows: int, seed: int, arm: str) -> dict[str, Any]:
    """One arm trained for an epoch, and its loss on test rows."""
    from benchmarks.arms import run_arm

    result = run_arm(arm, large_task(name, rows, seed), seed=seed, budget=Budget(**BUDGET))
    told = ("test_loss", "train_steps", "seconds")
    return (
        {"task": name, "rows": rows, "seed": seed, "arm": arm} | {k: getattr(result, k) for k in told} | provenance()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=[*TASKS], choices=TASKS)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--estimators", nargs="*", default=["probe", "fast"], choices=ESTIMATORS)
    parser.add_argument("--train", nargs="*", default=[], metavar="ARM")
    add_arguments(parser)
    options = parser.parse_args()
    made = [(weigh, each) for each in options.estimators] + [(train, each) for each in options.train]
    jobs = (
        Job(FOLDER / f"{task}-{options.rows}-{name}-seed{seed}.json", make, (task, options.rows, seed, name))
        for seed in options.seeds
        for task in options.tasks
        for make, name in made
    )
    run_jobs(jobs, options)


if __name__ == "__main__":
    main()
