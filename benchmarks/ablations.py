"""What the weights owe to the trusted set and to the mixture: the pilot run alone, one thing changed at a time.

python -m benchmarks.ablations [--settings ...] [--seeds 0 1 2]

On SmolLM2-135M-Instruct. Results go to `benchmarks/results/ablations`; `python -m benchmarks.report` makes the table.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from datasets import Dataset

from benchmarks.run import machine, versions
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import budget_of, make_trainer
from trl_bilevel.demo.tasks import Task, make_task

HERE = Path(__file__).parent
FOLDER = HERE / "results" / "ablations"

# By name: task, arguments of `make_task`, share of the trusted rows that is damaged.
SETTINGS: dict[str, tuple[str, dict, float]] = {
    **{
        f"{task}, {count} trusted rows": (task, {"validation_rows": count}, 0.0)
        for task in ("boilerplate", "quality")
        for count in (8, 16, 32, 64, 128, 256)
    },
    **{
        f"{task}, {share:.0%} damaged": (task, {"damaged_share": share}, 0.0)
        for task in ("boilerplate", "quality")
        for share in (0.1, 0.3, 0.5, 0.7, 0.9)
    },
    **{f"{task}, 10% of the trusted rows bad": (task, {}, 0.1) for task in ("boilerplate", "quality")},
}


def with_bad_trusted_rows(task: Task, share: float, seed: int) -> Task:
    """The task with the answers of some of its trusted rows replaced by those of damaged training rows."""
    rng = random.Random(f"trusted-{seed}")
    rows = [dict(row) for row in task.validation]
    damaged = [row["completion"] for row in task.train if row["kind"] != "good"]
    for place in rng.sample(range(len(rows)), round(share * len(rows))):
        rows[place]["completion"] = rng.choice(damaged)
    return replace(task, validation=Dataset.from_list(rows))


def measure(setting: str, seed: int) -> dict:
    name, arguments, bad_share = SETTINGS[setting]
    task = with_bad_trusted_rows(make_task(name, seed, **arguments), bad_share, seed)
    budget = budget_of(name, overrides={"pilot_steps": 24})
    trainer, _ = make_trainer("bilevel", task, seed=seed, budget=budget, output_dir=tempfile.mkdtemp())
    trainer.state.max_steps = 96
    start = time.perf_counter()
    trainer.start_selection()
    weights, kinds = trainer.sample_weights().tolist(), task.train["kind"][:]
    return {
        "setting": setting,
        "seed": seed,
        "auc": ranking_quality(weights, kinds),
        "good_share": good_share(weights, kinds),
        "good_rows": kinds.count("good") / len(kinds),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for setting in options.settings:
            target = FOLDER / f"{setting}-seed{seed}.json"
            if target.exists():
                continue
            record = measure(setting, seed)
            target.write_text(json.dumps(record, indent=1))
            auc = {kind: round(value, 3) for kind, value in record["auc"].items()}
            print(f"{setting:40} {seed} {auc}, on good rows {record['good_share']:.0%}", flush=True)


if __name__ == "__main__":
    main()
