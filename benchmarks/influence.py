"""Rows of most influence on the validation rows, as the library dattri attributes it (`pip install dattri`).

Grad-Cos: its TracIn with normalised gradients, at one checkpoint of a short run on all rows, by the LoRA parameters
alone.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from trl_bilevel.data.identity import sample_ids
from trl_bilevel.data.tokens import Tokeniser
from trl_bilevel.demo.experiment import Budget, make_trainer
from trl_bilevel.demo.tasks import Task
from trl_bilevel.weights.settings import PILOT_LEARNING_RATE, default_pilot_steps

# Training rows whose gradients are held at once.
BATCH = 16
Row = tuple[Tensor, Tensor]


def influential_rows(
    task: Task, *, seed: int, budget: Budget, count: int, model: str | None = None
) -> tuple[list[int], list[float]]:
    """Train on all rows as long as a pilot run would, then rank the rows by dattri.

    Args:
        task, seed, budget, model: as for `make_trainer`.
        count: how many rows to return.

    Returns:
        the rows of most influence, best first; the influence of every training row: mean over the validation rows of
        the cosine of both gradients, -1 for rows that preparation drops.
    """
    try:
        from dattri.algorithm import TracInAttributor
        from dattri.task import AttributionTask
    except ImportError as error:
        raise ImportError("The arm 'dattri' needs the library of that name: `pip install dattri`.") from error

    folder = tempfile.mkdtemp()
    trainer = warmed_up(task, seed=seed, budget=budget, model=model, output_dir=folder)
    shutil.rmtree(folder, ignore_errors=True)
    # The processor's fused attention cannot be batched over rows, dattri's way to a gradient per row.
    trainer.model.set_attn_implementation("eager")
    attributor = TracInAttributor(
        AttributionTask(row_loss(trainer.model), trainer.model, trainer.model.state_dict()),
        weight_list=torch.ones(1),
        normalized_grad=True,
        # Left out, gradients are projected at random on 512 dimensions.
        projector_kwargs={"proj_type": "identity"},
        device=str(trainer.args.device),
    )
    read = Tokeniser(trainer.processing_class, trainer.args.max_length)
    train, validation = read.prepare(task.train.remove_columns("kind")), read.prepare(task.validation)
    # dattri takes the gradients of the second rows again for each batch of the first ones. A cosine has no direction,
    # so the validation rows come first, in one batch: every gradient is taken once.
    cosines = attributor.attribute(batches(trainer, validation, len(validation)), batches(trainer, train, BATCH))
    influence = torch.full((len(task.train),), -1.0)
    influence[sample_ids(train)] = cosines.mean(0)
    return influence.topk(count).indices.tolist(), influence.tolist()


def warmed_up(task: Task, *, budget: Budget, **settings: Any) -> Any:
    """The trainer of the `uniform` arm after as many steps as a pilot run takes, at a pilot run's learning rate."""
    rows = len(task.train)
    steps = budget.pilot_steps or default_pilot_steps(rows)
    rate = {"learning_rate": PILOT_LEARNING_RATE, "lr_scheduler_type": "constant"}
    budget = replace(budget, epochs=steps * budget.batch_size / rows, overrides=budget.overrides | rate)
    trainer, _ = make_trainer("uniform", task, budget=budget, **settings)
    trainer.train()
    return trainer


def row_loss(model: torch.nn.Module) -> Callable[[Mapping[str, Tensor], Row], Tensor]:
    """A row's mean loss per scored token (nats) as a function of trainable parameters by name and of the row.

    The row is `input_ids`, `labels`, int64 `[S]` each, padded on the right: what is scored never sees the padding, so
    no mask is needed.
    """

    def loss(parameters: Mapping[str, Tensor], row: Row) -> Tensor:
        ids, labels = row
        inputs = {"input_ids": ids[None], "use_cache": False}
        logits = torch.func.functional_call(model, dict(parameters), (), inputs).logits[0, :-1]
        return cross_entropy(logits.float(), labels[1:])

    return loss


def batches(trainer: Any, rows: Dataset, size: int) -> DataLoader:
    """Prepared rows in their order, as `input_ids` and `labels`, `[size, S]` each."""

    def collate(members: list[dict[str, Any]]) -> Row:
        batch = trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in members])
        return batch["input_ids"], batch["labels"]

    return DataLoader(rows, batch_size=size, collate_fn=collate)
