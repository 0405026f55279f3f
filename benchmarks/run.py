"""Run the experiments in `benchmarks/experiments` and write one JSON per run to `benchmarks/results`.

An experiment has arms; `variants`, settings of one of them (of `refine`, unless `variants_of` names another); and
`budgets`, arms with changes to the budget.

python -m benchmarks.run [NAME ...] [--seeds 0 1 2] [--arms uniform bilevel] [--force] [--jobs 1]

A run whose result is there is skipped.
The arm `dattri` is left out without that library (`pip install dattri`).
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import REFINING, run_arm
from benchmarks.influence import influential_rows
from benchmarks.jobs import METHOD, Job, add_arguments, run_jobs
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import Budget
from trl_bilevel.demo.tasks import make_task

HERE = Path(__file__).parent
PACKAGES = ("trl-bilevel", "trl", "torch", "transformers", "peft", "accelerate", "datasets")


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    found = {"processor": name, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def provenance() -> dict[str, Any]:
    """What a result of learned weights was made with."""
    return {"method": METHOD, "versions": versions(), "machine": machine()}


def known_weights(experiment: dict, seed: int) -> dict[str, Any]:
    """Result of the `bilevel` arm of the same task and budget, whose weights are taken.

    Raises:
        FileNotFoundError: if that arm has not run: another run's weights would be others.
    """
    file = weights_file(experiment, seed)
    if not file.exists():
        raise FileNotFoundError(f"{file.name} of {file.parent.name} comes first: its weights are needed.")
    return json.loads(file.read_text())


def weights_file(experiment: dict, seed: int) -> Path:
    folder = HERE / "results" / experiment.get("folder", "")
    return folder / experiment.get("weights_of", experiment["name"]) / f"bilevel-seed{seed}.json"


def run_one(experiment: dict, arm: str, name: str, seed: int) -> dict[str, Any]:
    """A run of an arm, under the name of the arm, of a variant or of a budget."""
    task = make_task(experiment["task"], seed)
    budget = Budget(**experiment["budget"] | experiment.get("budgets", {}).get(name, {}).get("changes", {}))
    variant = name if name in experiment.get("variants", {}) else None
    if variant is not None:
        changes = budget.refining if arm in REFINING else budget.overrides
        changes |= experiment["variants"][variant]
    reuses = arm in (*REFINING, "bilevel_trusted") or (variant is not None and "weights_of" in experiment)
    known = known_weights(experiment, seed) if reuses else {}
    chosen: dict[str, Any] = {}
    if arm == "dattri":
        start = time.perf_counter()
        keep, influence = influential_rows(task, seed=seed, budget=budget, count=sum(task.good))
        chosen = {"keep": keep, "choosing_seconds": time.perf_counter() - start}
    result = run_arm(arm, task, seed=seed, budget=budget, weights=known.get("weights"), **chosen)
    record = asdict(result) | {
        "arm": name,
        "experiment": experiment["name"],
        **provenance(),
    }
    # Weights that were taken are as old as the run that learned them.
    record["method"] = known.get("method", 1) if known else METHOD
    record["history"] = [entry for entry in result.history if "loss" in entry]
    if result.weights is not None:
        kinds = task.train["kind"]
        # Trusted rows that an arm trains on come last.
        result.weights = result.weights[: len(kinds)]
        record["auc"] = ranking_quality(result.weights, kinds)
        record["good_share"] = good_share(result.weights, kinds)
        record["weights"] = [round(weight, 4) for weight in result.weights]
    if chosen:
        record["versions"]["dattri"] = version("dattri")
        record["choosing_seconds"] = chosen["choosing_seconds"]
        record["influence_auc"] = ranking_quality(influence, task.train["kind"])
    return record


def experiments(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Those of the names given, in that order; all by default."""
    files = [HERE / "experiments" / f"{name}.json" for name in names] or sorted((HERE / "experiments").glob("*.json"))
    return [json.loads(file.read_text()) | {"name": file.stem} for file in files]


def jobs_of(
    experiment: dict[str, Any], seeds: Sequence[int] | None = None, arms: Sequence[str] | None = None
) -> Iterator[Job]:
    """The runs of an experiment, seed by seed."""
    variants = experiment.get("variants", {})
    runs = {name: name for name in experiment["arms"]}
    # Settings of one arm, and other budgets of several, each under a name of its own.
    runs |= dict.fromkeys(variants, experiment.get("variants_of", "refine"))
    runs |= {name: each["arm"] for name, each in experiment.get("budgets", {}).items()}
    for seed in experiment["seeds"] if seeds is None else seeds:
        for name, arm in runs.items():
            if arms and name not in arms:
                continue
            if arm == "dattri" and find_spec("dattri") is None:
                print(f"dattri-seed{seed}: left out, dattri is not installed (`pip install dattri`)", flush=True)
                continue
            target = HERE / "results" / experiment.get("folder", "") / experiment["name"] / f"{name}-seed{seed}.json"
            reuses = arm in (*REFINING, "bilevel_trusted") or name in variants
            needs = weights_file(experiment, seed) if reuses else None
            yield Job(target, run_one, (experiment, arm, name, seed), needs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments; all by default")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--arms", nargs="*")
    parser.add_argument("--folder", default="", help="below `results`: `cpu` for those that are made without a GPU")
    add_arguments(parser)
    options = parser.parse_args()
    found = [each | {"folder": options.folder} for each in experiments(options.names)]
    run_jobs((job for each in found for job in jobs_of(each, options.seeds, options.arms)), options)


if __name__ == "__main__":
    main()
