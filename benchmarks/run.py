"""Run the experiments in `benchmarks/experiments` and write one JSON per run to `benchmarks/results`.

python -m benchmarks.run [NAME ...] [--seeds 0 1 2] [--arms uniform bilevel] [--force]

A run whose result is there is skipped, so several of these commands side by side with other seeds share the work.
The arm `dattri` is left out without that library (`pip install dattri`).
"""

import argparse
import json
import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.influence import influential_rows
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import REFINING, Budget, run_arm
from trl_bilevel.demo.tasks import make_task

HERE = Path(__file__).parent
# Of the default weights, raised when they change. 2: smoothed (`pilot_smoothing`), full weight from the lower quartile
# of trusted scores on; before it, from their mean on.
METHOD = 2
PACKAGES = ("trl-bilevel", "trl", "torch", "transformers", "peft", "accelerate", "datasets")


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"processor": name, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def provenance() -> dict[str, Any]:
    """What a result of learned weights was made with."""
    return {"method": METHOD, "versions": versions(), "machine": machine()}


def known_weights(experiment: dict, seed: int) -> list[float] | None:
    """Weights that the `bilevel` arm of the same task and budget has learned; None if it has not run."""
    file = HERE / "results" / experiment.get("weights_of", experiment["name"]) / f"bilevel-seed{seed}.json"
    return json.loads(file.read_text())["weights"] if file.exists() else None


def run_one(experiment: dict, arm: str, variant: str | None, seed: int, target: Path) -> None:
    task = make_task(experiment["task"], seed)
    budget = Budget(**experiment["budget"])
    if variant is not None:
        changes = budget.refining if arm in REFINING else budget.overrides
        changes |= experiment["variants"][variant]
    reuses = arm in REFINING or (variant is not None and "weights_of" in experiment)
    weights = known_weights(experiment, seed) if reuses else None
    chosen: dict[str, Any] = {}
    if arm == "dattri":
        start = time.perf_counter()
        keep, influence = influential_rows(task, seed=seed, budget=budget, count=sum(task.good))
        chosen = {"keep": keep, "choosing_seconds": time.perf_counter() - start}
    result = run_arm(arm, task, seed=seed, budget=budget, weights=weights, **chosen)
    record = asdict(result) | {
        "arm": variant or arm,
        "experiment": experiment["name"],
        **provenance(),
    }
    record["history"] = [entry for entry in result.history if "loss" in entry]
    if result.weights is not None:
        kinds = task.train["kind"]
        record["auc"] = ranking_quality(result.weights, kinds)
        record["good_share"] = good_share(result.weights, kinds)
        record["weights"] = [round(weight, 4) for weight in result.weights]
    if chosen:
        record["versions"]["dattri"] = version("dattri")
        record["choosing_seconds"] = chosen["choosing_seconds"]
        record["influence_auc"] = ranking_quality(influence, task.train["kind"])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1))
    figures = {k: record.get(k) for k in ("test_loss", "auc", "influence_auc", "good_share", "safety", "seconds")}
    print(target.stem, json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments; all by default")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--arms", nargs="*")
    parser.add_argument("--force", action="store_true", help="run again what has a result")
    options = parser.parse_args()
    for file in sorted((HERE / "experiments").glob("*.json")):
        if options.names and file.stem not in options.names:
            continue
        experiment = json.loads(file.read_text()) | {"name": file.stem}
        # Variants are settings of one arm, each under a name of its own.
        jobs = [(arm, None) for arm in experiment["arms"]]
        jobs += [(experiment.get("variants_of", "refine"), variant) for variant in experiment.get("variants", {})]
        for seed in experiment["seeds"] if options.seeds is None else options.seeds:
            for arm, variant in jobs:
                name = variant or arm
                target = HERE / "results" / file.stem / f"{name}-seed{seed}.json"
                if (options.arms and name not in options.arms) or (target.exists() and not options.force):
                    continue
                if arm == "dattri" and find_spec("dattri") is None:
                    print(f"{target.stem}: left out, dattri is not installed (`pip install dattri`)", flush=True)
                else:
                    run_one(experiment, arm, variant, seed, target)


if __name__ == "__main__":
    main()
