"""The common yardstick: how well each estimator tells good rows from damaged ones, over training time.

python -m benchmarks.yardstick [--models tiny SmolLM2-135M-Instruct] [--tasks quality safety] [--seeds 0 1]

One run per model, task and seed: as in a pilot run, a model is trained on mixture and validation rows (lambda = 0.5)
and a tracker beside it on the mixture alone. At chosen steps every signal scores the same rows, from both: area
under the ROC curve per kind of damage, and FLOPs of scoring a row over those of training on it. Results go to
`benchmarks/results/yardstick`; `python -m benchmarks.report` makes the tables.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trl_bilevel.estimators import AlignmentEstimator, LookaheadEstimator, ValueFunctionEstimator
from trl_bilevel.trainer.passes import row_batches
from trl_bilevel.trainer.pilot import make_pilot

from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import machine, versions
from benchmarks.tiny import pretrained_tiny_model
from trl_bilevel.demo.comparison import ranking_quality
from trl_bilevel.demo.experiment import budget_of, make_trainer
from trl_bilevel.demo.tasks import make_task

FOLDER = Path(__file__).parent / "results" / "yardstick"
SMOLLM2 = "SmolLM2-135M-Instruct"
# When rows are scored; the real model takes minutes for each.
STEPS: dict[str, tuple[int, ...]] = {"tiny": (0, 6, 12, 24, 48), SMOLLM2: (0, 12, 24)}
ROWS = 192
AVERAGED_EVERY = 4
# Directions of `alignment`: each is measured as it is and divided by the norm of the row's gradient.
DIRECTIONS: dict[str, dict[str, Any]] = {
    "gradient": {"precondition": False},
    "preconditioned": {"precondition": True},
    "displacement": {"displacement": True, "lookahead_steps": 4},
}
LOOKAHEADS = (4, 12)
Scores = Callable[[Any], Tensor]


class Probe(ValueFunctionEstimator):
    """The tracker of a pilot run, which stops at chosen steps to have the rows scored in every way."""

    def __init__(self, host: Any, rows: Tensor, kinds: list[str], steps: tuple[int, ...]):
        super().__init__(host)
        self.steps = steps
        self.rows = rows
        self.kinds = kinds
        self.found: dict[int, dict[str, dict[str, float]]] = {}
        self.flops: dict[str, float] = {}
        self.averaged = AlignmentEstimator(host, refresh_steps=AVERAGED_EVERY, averaging=0.8)

    def begin_step(self, window: Any) -> list[Tensor] | None:
        self.averaged.begin_step(window)
        self.measure()
        return super().begin_step(window)

    def prepare_scoring(self) -> None:
        self.measure()

    def measure(self) -> None:
        step = self.host.current_step()
        if step not in self.steps or step in self.found:
            return
        model = self.host.model
        model.eval()
        if not self.flops:
            self.flops["training"] = self.count(self.train_once)
        self.found[step] = {}
        for name, scores in self.signals():
            if name not in self.flops:
                self.flops[name] = self.count(scores)
            self.found[step] |= self.quality(name, scores)
        model.train()

    def signals(self) -> Iterator[tuple[str, Scores]]:
        """What scores rows, by name; names say which parameters it looks from: the model's, or the tracker's."""
        yield "loss", lambda batch: -self.host.row_losses(batch).means()
        yield "value_function", lambda batch: self.row_scores(batch)[:, 0]
        # The direction is an average over earlier steps: it does not follow the tracker.
        yield "alignment, preconditioned, averaged (model)", self.alignment(self.averaged)
        for place, there in (("model", nullcontext), ("tracker", self.shadow.swapped)):
            with there():
                for steps in LOOKAHEADS:
                    lookahead = LookaheadEstimator(self.host, lookahead_steps=steps)
                    lookahead.prepare_scoring()
                    yield f"lookahead, K = {steps} ({place})", lambda batch, e=lookahead: e.row_scores(batch)[:, 0]
                for name, settings in DIRECTIONS.items():
                    if place == "tracker" and name == "preconditioned":
                        continue
                    estimator = AlignmentEstimator(self.host, averaging=0.0, **settings)
                    estimator.prepare_scoring()
                    yield f"alignment, {name} ({place})", self.alignment(estimator)

    def alignment(self, estimator: AlignmentEstimator) -> Scores:
        """Inner products and cosines of a batch, `[b, 2]`, from one backward."""

        def scores(batch: Any) -> Tensor:
            rows = len(batch["input_ids"])
            with torch.enable_grad(), estimator._gradients_aside(), estimator.taps.watch(rows, norms=True) as sink:
                found = self.host.row_losses(batch)
                (found.sums / found.counts).sum().backward()
            return torch.stack([sink.products, sink.scores()], 1)

        return scores

    @torch.no_grad()
    def quality(self, name: str, scores: Scores) -> dict[str, dict[str, float]]:
        """AUC per kind of damage; of the products and of the cosines, if these are two."""
        out = torch.full((len(self.kinds), 2), torch.nan)
        for batch in self.batches():
            found = scores(batch).float().cpu()
            out[batch["sample_id"].cpu(), : found[0].numel()] = found.view(len(found), -1)
        seen = ~out[:, 0].isnan()
        kinds = [kind for kind, known in zip(self.kinds, seen.tolist(), strict=True) if known]
        columns = (
            [name] if bool(out[seen, 1].isnan().any()) else [name, name.replace("alignment", "alignment, cosine")]
        )
        return {label: ranking_quality(out[seen, i].tolist(), kinds) for i, label in enumerate(columns)}

    def batches(self) -> Iterator[Any]:
        trainer = self.host.trainer
        return (trainer._prepare_inputs(batch) for batch in row_batches(trainer, self.rows, "Measuring"))

    def train_once(self, batch: Any) -> None:
        with self.averaged._gradients_aside(), torch.enable_grad():
            self.host.row_losses(batch).sums.sum().backward()

    def count(self, work: Callable[[Any], Any]) -> float:
        """FLOPs of a batch."""
        # On a GPU the LM head adds products up in fp32, `addmm` with a dtype in a place that torch's counter trips on.
        mapping = {torch.ops.aten.addmm: addmm_flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
            work(next(iter(self.batches())))
        return counter.get_total_flops()


def addmm_flops(added: torch.Size, left: torch.Size, right: torch.Size, *rest: Any, **more: Any) -> int:
    """FLOPs of `added + left @ right`, whatever else is given."""
    return 2 * left[0] * left[1] * right[1]


def measure(model: str, name: str, seed: int) -> dict:
    task = make_task(name, seed)
    budget = budget_of(name, overrides={"per_device_eval_batch_size": 8})
    steps = STEPS[model]
    folder = None if model == SMOLLM2 else pretrained_tiny_model()
    trainer, _ = make_trainer("bilevel", task, seed=seed, budget=budget, model=folder, output_dir=tempfile.mkdtemp())
    trainer.state.max_steps = 4 * steps[-1]
    trainer.args.pilot_steps, trainer.args.pilot_scored_rows = steps[-1], 16
    pilot = make_pilot(trainer)
    probe = Probe(pilot.host, trainer.row_order()[:ROWS], task.train["kind"], steps)
    pilot.estimator = probe
    pilot.run()
    training = probe.flops.pop("training")
    return {
        "model": model,
        "task": name,
        "seed": seed,
        "rows": ROWS,
        "auc": probe.found,
        "scoring_cost": {signal: round(flops / training, 3) for signal, flops in probe.flops.items()},
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
