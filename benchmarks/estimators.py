"""Quality of calibrated weights by estimator and its settings: the pilot run alone, no training after it.

python -m benchmarks.estimators [--tasks ...] [--seeds 0 1] [--settings lookahead ...]

On SmolLM2-135M-Instruct. Results go to `benchmarks/results/estimators`; `python -m benchmarks.report` makes the table.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import provenance
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import budget_of, make_trainer
from trl_bilevel.demo.tasks import SAFETY_TASKS, make_task

FOLDER = Path(__file__).parent / "results" / "estimators"
TASKS = ("quality", "boilerplate", "scrambled", "truncated", "safety")
# Of a safety task alone: other tasks have trusted rows of one kind.
TWO_SETS = "value_function, trusted rows as two sets"
SETTINGS: dict[str, dict] = {
    "value_function": {},
    TWO_SETS: {"validation_weights": {"benign": 0.5, "refused": 0.5}},
    "lookahead": {"weight_estimator": "lookahead"},
    "probe": {},
}
# With more rows than the defaults score: what prediction costs.
PRESET_TASK = "quality_large"
PRESETS: dict[str, dict] = {name: {"selector_preset": name} for name in ("reliable", "balanced", "fast")}


def measure(name: str, seed: int, setting: str) -> dict:
    task = make_task(name, seed)
    arm, steps = ("probe", {}) if setting == "probe" else ("bilevel", {"pilot_steps": 24})
    budget = budget_of(name, overrides=(SETTINGS | PRESETS)[setting] | steps)
    trainer, _ = make_trainer(arm, task, seed=seed, budget=budget, output_dir=tempfile.mkdtemp())
    start = time.perf_counter()
    trainer.choose_weights()
    seconds = time.perf_counter() - start
    weights, kinds = trainer.sample_weights(), task.train["kind"]
    good = weights[torch.tensor(task.good)]
    return {
        "task": name,
        "seed": seed,
        "setting": setting,
        "auc": ranking_quality(weights.tolist(), kinds),
        "good_share": good_share(weights.tolist(), kinds),
        "ess_good": float(good.sum() ** 2 / (len(good) * (good**2).sum())),
        "seconds": round(seconds, 1),
        **provenance(),
    }


def suits(setting: str, task: str) -> bool:
    """Presets are tried where there are more rows than the default scores, two sets where there are two kinds."""
    if (setting in PRESETS) != (task == PRESET_TASK):
        return False
    return setting != TWO_SETS or task in SAFETY_TASKS


def jobs(tasks: Sequence[str], settings: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    for seed in seeds:
        for name in tasks:
            for setting in (each for each in settings if suits(each, name)):
                yield Job(FOLDER / f"{name}-{setting}-seed{seed}.json", measure, (name, seed, setting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=[*TASKS, PRESET_TASK])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--settings", nargs="*", default=[*SETTINGS, *PRESETS])
    add_arguments(parser)
    options = parser.parse_args()
    run_jobs(jobs(options.tasks, options.settings, options.seeds), options)


if __name__ == "__main__":
    main()
