"""How well weights of rows that were not scored are predicted, by number of scored rows and depth of the features.

python -m benchmarks.amortised [--tasks quality_large] [--seeds 0]

One pilot run of the default estimator on SmolLM2-135M-Instruct scores all rows; then subsets of them stand in for the
scored rows (mean of 4 draws each), and the others are predicted. Results go to `benchmarks/results/amortised`.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import provenance
from trl_bilevel.core.prediction import fit_weight_predictor, recalibrated
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import budget_of, make_trainer
from trl_bilevel.demo.tasks import make_task
from trl_bilevel.weights.language_model import LanguageModel
from trl_bilevel.weights.pilot import BATCH_ROWS, BATCH_TOKENS
from trl_bilevel.weights.prediction import features as row_features

FOLDER = Path(__file__).parent / "results" / "amortised"
SCORED = (32, 64, 128, 256, 512)
DEPTHS = (0.1, 0.2, 0.3, 0.4, 0.67)
DRAWS = 4


@torch.no_grad()
def read_states(trainer: Any) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
    """Features of the training rows, in the caller's order, and of the trusted rows, by depth."""
    trainer.model.eval()
    model, rows = LanguageModel(trainer.model), trainer.rows
    found: dict[int, list[Tensor]] = {}
    for part in rows.batches(range(len(rows)), BATCH_TOKENS, BATCH_ROWS):
        states = row_features(model, rows.batch(part), DEPTHS)
        found |= {int(rows.ids[place]): [each[n] for each in states] for n, place in enumerate(part)}
    (own,) = trainer.trusted.sets.values()
    batches = [row_features(model, own.batch(part), DEPTHS) for part in torch.arange(len(own)).split(BATCH_ROWS)]
    features = {depth: torch.stack([found[row][n] for row in range(rows.count)]) for n, depth in enumerate(DEPTHS)}
    return features, {depth: torch.cat([part[n] for part in batches]) for n, depth in enumerate(DEPTHS)}


def measure(name: str, seed: int) -> dict:
    task = make_task(name, seed)
    budget = budget_of(name, overrides={"pilot_scored_rows": 0})
    trainer, _ = make_trainer("bilevel", task, seed=seed, budget=budget, output_dir=tempfile.mkdtemp())
    trainer.choose_weights()
    weights = trainer.sample_weights()
    features, trusted = read_states(trainer)
    kinds = task.train["kind"]
    largest = weights.max()
    record = {
        "task": name,
        "seed": seed,
        "auc_scored": ranking_quality(weights.tolist(), kinds),
        "good_share_scored": good_share(weights.tolist(), kinds),
        "rows": len(kinds),
        **provenance(),
        "predicted": {},
    }
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(weights), generator=generator) for _ in range(DRAWS)]
    for depth, states in features.items():
        for count in SCORED:
            found = []
            for order in orders:
                scored, rest = order[:count], order[count:]
                predictor = fit_weight_predictor(states[scored], weights[scored] / largest)
                average = float((weights[scored] / largest).mean())
                predicted = recalibrated(predictor(states[rest]), predictor(trusted[depth]), average).tolist()
                names = [kinds[row] for row in rest.tolist()]
                found.append((ranking_quality(predicted, names)["all"], good_share(predicted, names)))
            auc, share = (sum(values) / DRAWS for values in zip(*found, strict=True))
            record["predicted"][f"depth {depth:g}, {count} scored"] = {
                "depth": depth,
                "scored": count,
                "auc": round(auc, 4),
                "good_share": round(share, 4),
            }
            print(name, seed, f"depth {depth:g}, {count} scored: AUC {auc:.3f}, on good rows {share:.0%}", flush=True)
    return record


def jobs(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    for name in tasks:
        for seed in seeds:
            yield Job(FOLDER / f"{name}-seed{seed}.json", measure, (name, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=["quality_large"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    add_arguments(parser)
    options = parser.parse_args()
    run_jobs(jobs(options.tasks, options.seeds), options)


if __name__ == "__main__":
    main()
