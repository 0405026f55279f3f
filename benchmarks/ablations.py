"""What the weights owe to the trusted set and to the mixture: weights alone, one thing changed at a time.

python -m benchmarks.ablations [--settings ...] [--seeds 0 1 2] [--jobs 1]

On SmolLM2-135M-Instruct. Results go to `benchmarks/results/ablations`; `python -m benchmarks.report` makes the table.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import provenance
from trl_bilevel.data.assets import docstrings
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import budget_of, make_trainer
from trl_bilevel.demo.tasks import END, PROMPT, Task, make_task

HERE = Path(__file__).parent
FOLDER = HERE / "results" / "ablations"


@dataclass(frozen=True)
class Setting:
    """What is changed.

    Attributes:
        task: by name.
        arguments: of `make_task`.
        trusted_rows: how many, of the task's own first; more are drawn from rows that it does not use.
        bad_trusted: share of the trusted rows that get the answer of a damaged row.
        overrides: settings of the trainer.
        sources: the rows come from sources of these shares of damaged rows, and have a column `source`.
    """

    task: str
    arguments: dict[str, Any] = field(default_factory=dict)
    trusted_rows: int = 32
    bad_trusted: float = 0.0
    overrides: dict[str, Any] = field(default_factory=dict)
    sources: tuple[float, ...] = ()


SOURCES = (0.1, 0.4, 0.6, 0.9)
BY_SOURCE = {"selector_group_column": "source"}
TASKS = ("boilerplate", "quality")
SETTINGS: dict[str, Setting] = {
    **{
        f"{task}, {count} trusted rows": Setting(task, trusted_rows=count)
        for task in TASKS
        for count in (8, 16, 32, 64, 128, 256)
    },
    **{
        f"{task}, {share:.0%} damaged": Setting(task, {"damaged_share": share})
        for task in TASKS
        for share in (0.1, 0.3, 0.5, 0.7, 0.9)
    },
    **{f"{task}, 10% of the trusted rows bad": Setting(task, bad_trusted=0.1) for task in TASKS},
    **{
        f"boilerplate from four sources, a weight per {unit}": Setting(
            "boilerplate", overrides=overrides, sources=SOURCES
        )
        for unit, overrides in (("row", {}), ("source", BY_SOURCE))
    },
    **{
        f"quality, calibration_sharpness = {k}": Setting("quality", overrides={"calibration_sharpness": k})
        for k in (0.5, 2.0)
    },
}


def with_trusted_rows(task: Task, count: int, seed: int) -> Task:
    """The same training rows with another number of trusted ones."""
    own = [dict(row) for row in task.validation]
    used = {row["prompt"] for rows in (task.train, task.validation, task.test) for row in rows}
    every = [{"prompt": PROMPT.format(name=r["name"]), "completion": r["description"] + END} for r in docstrings()]
    spare = [row for row in every if row["prompt"] not in used]
    random.Random(f"more-{seed}").shuffle(spare)
    return replace(task, validation=Dataset.from_list([*own, *spare][:count]))


def with_bad_trusted_rows(task: Task, share: float, seed: int) -> Task:
    """The task with the answers of some of its trusted rows replaced by those of damaged training rows."""
    rng = random.Random(f"trusted-{seed}")
    rows = [dict(row) for row in task.validation]
    damaged = [row["completion"] for row in task.train if row["kind"] != "good"]
    for place in rng.sample(range(len(rows)), round(share * len(rows))):
        rows[place]["completion"] = rng.choice(damaged)
    return replace(task, validation=Dataset.from_list(rows))


def with_sources(task: Task, damaged: tuple[float, ...], seed: int) -> Task:
    """The task with a column `source`: a damaged row comes from a source in proportion to its share of such rows."""
    rng = random.Random(f"sources-{seed}")
    names = [f"{share:.0%} damaged" for share in damaged]
    shares = {True: [1 - share for share in damaged], False: damaged}
    column = [rng.choices(names, shares[good])[0] for good in task.good]
    return replace(task, train=task.train.add_column("source", column))


def measure(name: str, seed: int) -> dict:
    setting = SETTINGS[name]
    task = with_trusted_rows(make_task(setting.task, seed, **setting.arguments), setting.trusted_rows, seed)
    task = with_bad_trusted_rows(task, setting.bad_trusted, seed)
    if setting.sources:
        task = with_sources(task, setting.sources, seed)
    budget = budget_of(setting.task, overrides=setting.overrides)
    trainer, _ = make_trainer("bilevel", task, seed=seed, budget=budget, output_dir=tempfile.mkdtemp())
    start = time.perf_counter()
    trainer.choose_weights()
    weights, kinds = trainer.sample_weights().tolist(), task.train["kind"][:]
    return {
        "setting": name,
        "seed": seed,
        "auc": ranking_quality(weights, kinds),
        "good_share": good_share(weights, kinds),
        "good_rows": kinds.count("good") / len(kinds),
        "seconds": round(time.perf_counter() - start, 1),
        **provenance(),
    }


def jobs(settings: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    for seed in seeds:
        for setting in settings:
            yield Job(FOLDER / f"{setting}-seed{seed}.json", measure, (setting, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    add_arguments(parser)
    options = parser.parse_args()
    run_jobs(jobs(options.settings, options.seeds), options)


if __name__ == "__main__":
    main()
