"""How well weights of rows that were not scored are predicted, by number of scored rows and depth of the features.

python -m benchmarks.amortised [--tasks quality_large] [--seeds 0]

One pilot run of the default estimator on SmolLM2-135M-Instruct scores all rows; then subsets of them stand in for the
scored rows (mean of 4 draws each), and the others are predicted. Results go to `benchmarks/results/amortised`.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from trl_bilevel.core.amortised import fit_weight_predictor, recalibrated
from trl_bilevel.trainer.amortise import row_features
from trl_bilevel.trainer.passes import row_batches

from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import provenance
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import budget_of, make_trainer
from trl_bilevel.demo.tasks import make_task

FOLDER = Path(__file__).parent / "results" / "amortised"
SCORED = (32, 64, 128, 256, 512)
DEPTHS = (0.1, 0.2, 0.3, 0.4, 0.67)
DRAWS = 4


def measure(name: str, seed: int) -> dict:
    task = make_task(name, seed)
    budget = budget_of(name, overrides={"pilot_scored_rows": 0})
    trainer, _ = make_trainer("bilevel", task, seed=seed, budget=budget, output_dir=tempfile.mkdtemp())
    # The pilot of a full run: 24 steps.
    trainer.state.max_steps = 96
    trainer.start_selection()
    weights = trainer.sample_weights()
    trainer.model.eval()
    features, trusted = {}, {}
    for depth in DEPTHS:
        states = {}
        for batch in row_batches(trainer, trainer.row_order(), "Reading rows"):
            states |= dict(zip(batch["sample_id"].tolist(), *row_features(trainer, batch, [depth]), strict=True))
        features[depth] = torch.stack([states[row] for row in range(len(weights))])
        batches = trainer.validation.all_batches(16)
        trusted[depth] = torch.cat(
            [row_features(trainer, trainer._prepare_inputs(batch), [depth])[0] for _, batch in batches]
        )
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
