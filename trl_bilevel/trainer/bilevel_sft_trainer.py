"""[`BilevelSFTTrainer`]: TRL's SFT trainer on rows that are weighted by what they do for a trusted set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from ..data.cards import CITATION, PAPER_ID, PAPER_TITLE
from ..data.identity import SAMPLE_ID, SAMPLE_LENGTHS, SEGMENTS, SampleIdCollator, without_numbers
from ..data.rows import Rows
from ..data.sampling import WeightedSampler
from ..data.scored import scored_tokens, with_scored_tokens
from ..data.tokens import Tokeniser
from ..data.trusted import TrustedSets
from ..weights.choose import check_sizes
from ..weights.errors import not_finite
from ..weights.processes import Processes
from ..weights.quantization import keep_4bit_weights
from ..weights.state import TrainingWeights
from . import checks, preparation
from .bilevel_sft_config import BilevelSFTConfig, resolved
from .checkpoints import WEIGHT_FILES, resume_point
from .choosing import ChoosesWeights, fingerprints, make_weights
from .record import RecordCallback, RunFacts
from .weighted_loss import ROW_FACTOR, StepFacts, TrustedPart, WeightedObjective, WeightedStep


class BilevelSFTTrainer(ChoosesWeights, SFTTrainer):
    """
    Trainer for supervised fine-tuning on data of mixed quality, guided by a small trusted validation set.

    Before the first step it learns a weight per training row, as `learn_weights` does, such that the model trained on
    the weighted rows has the least validation loss (bilevel data selection, https://huggingface.co/papers/2511.21056).
    Then it is `SFTTrainer` with a sampler that draws rows by their weights, or with weighted losses.

    Example:

    ```python
    trainer = BilevelSFTTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=BilevelSFTConfig(output_dir="out"),
        train_dataset=mixed,
        validation_dataset=trusted,
    )
    trainer.train()
    trainer.weighted_dataset().to_parquet("weighted.parquet")
    ```

    Args:
        model, data_collator, eval_dataset, processing_class, ...:
            As for [`~trl.SFTTrainer`]; all of its arguments are taken. `eval_dataset` only reports.
        args ([`BilevelSFTConfig`] or [`~trl.SFTConfig`], *optional*): configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of mixed quality, in any text format that [`~trl.SFTTrainer`] takes. With `weight_estimator="none"` a
            column `data_weight` gives the weights. Weights of a stream are chosen on its first rows, and predicted as
            further ones come (docs/scale.md).
        validation_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Trusted rows that say what good means, in the same formats; several sets make several objectives
            (`validation_weights`). Needed unless `weight_estimator="none"` and `validation_loss_weight=0`.

    Raises:
        ValueError, TypeError: for input that cannot work; the message names the argument, the value and the remedy.
        ImportError: if the installed TRL lacks what the settings need.

    Differs from [`~trl.SFTTrainer`] in the sampler and in the files of the weights. Where weights multiply losses, or
    the model is trained on trusted rows, each row's log-probabilities are multiplied before TRL sums them. Without
    weights and trusted rows it *is* `SFTTrainer`.
    """

    _tag_names = ["trl", "sft", "trl-bilevel", "bilevel-sft"]
    _name = "Bilevel SFT"
    _paper = {"title": PAPER_TITLE, "id": PAPER_ID, "citation": CITATION}
    # `compute_loss` divides by the tokens of the whole accumulation window itself, like its parent.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        validation_dataset: Dataset | Mapping[str, Dataset] | None = None,
        **sft_arguments: Any,
    ):
        args = resolved(args, model)
        formatting = sft_arguments.get("formatting_func")
        self.data = preparation.TrainingData.of(args, train_dataset, validation_dataset, formatting is not None)
        self._caller_rows = self.data.rows
        # How weights act: computed once, see `preparation.Mode`.
        self.mode = self.data.mode(args)
        self._unpacked: Dataset | None = None
        self._step: WeightedStep | None = None
        self._objective: WeightedObjective | None = None
        if self.mode.tracks_rows:
            checks.check_contract(SFTTrainer, self.mode.weighs_losses, self.mode.resamples)
        super().__init__(
            model,
            args,
            data_collator,
            self.data.numbered,
            without_numbers(eval_dataset) if self.mode.tracks_rows else eval_dataset,
            processing_class,
            **sft_arguments,
        )
        self.rows: Rows | None = None
        self.trusted: TrustedSets | None = None
        self.weights: TrainingWeights | None = None
        if self.mode.tracks_rows:
            self._check(args)
            keep_4bit_weights(self.model)
            self.rows = self._rows()
            self.trusted = self._trusted(formatting)
            if self.mode.weighs:
                self.weights = make_weights(args, self.data, self.rows, self._reader())
            if self.mode.weighs_losses:
                self.data_collator = SampleIdCollator(self.data_collator, self.merges_rows)
            else:
                # Rows that are drawn by their weights train as any rows: their batches are TRL's.
                self.train_dataset = without_numbers(self.train_dataset)
        elif self.data.trusted:
            # They choose nothing here, but their loss is followed.
            self.trusted = self._trusted(formatting)
        self._fingerprints = fingerprints(self.data.rows, self.data.trusted)
        self.record = RecordCallback(self._facts, self._losses_of, self.eval_dataset)
        self.add_callback(self.record)

    # What a user asks for

    def weighted_dataset(self, top_k: int | None = None) -> Any:
        """As the parent's; of a stream, a stream with `data_weight`, computed as it is read."""
        if not self.data.streams:
            return super().weighted_dataset(top_k)
        if top_k is not None:
            raise ValueError(f"`top_k={top_k}` needs rows that can be ranked, and `train_dataset` is a stream.")
        weights: Any = self.weights
        if weights is None or self.rows is None:
            return self.data.rows
        args, formatting = self.args, self._formatting_func
        settings = (args.max_length, args.dataset_text_field, self.completion_only_loss, args.assistant_only_loss)
        read = Tokeniser(self._tokenizer, *settings)
        return weights.weighted(self.data.rows, lambda row: read.row(row, formatting), self.rows.collate)

    def row_losses(self, dataset: Dataset) -> Tensor:
        """Mean loss per token of every row of a dataset under the present model, float32 `[rows]` on the CPU, in nats.

        Args:
            dataset (`Dataset`): in any format the trainer takes; rows that preparation drops give no entry.
        """
        if "labels" not in dataset.column_names:
            numbered = without_numbers(dataset).add_column(SAMPLE_ID, np.arange(len(dataset)))
            # TRL's own: ours would take the numbers away. Preparation may shuffle.
            dataset = SFTTrainer._prepare_dataset(
                self, numbered, self.processing_class, self.args, False, self._formatting_func, "scored"
            ).sort(SAMPLE_ID)
        return self._losses_of(preparation.readable_rows(self.args, dataset, self._padded(), len(dataset)))

    # Rows

    @property
    def merges_rows(self) -> bool:
        """True if a row of a training batch may hold several rows (packing, padding-free)."""
        return bool(self.args.packing or self.padding_free)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """The parent's preparation; packed training rows keep their numbers, other sets come without."""
        numbered = dataset is self.data.numbered
        if not (self.mode.tracks_rows and packing and numbered):
            if self.mode.tracks_rows and not numbered:
                dataset = without_numbers(dataset)
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

        def prepare(settings: SFTConfig) -> Dataset:
            return super(BilevelSFTTrainer, self)._prepare_dataset(
                dataset, processing_class, settings, False, formatting_func, dataset_name
            )

        self._unpacked, packed = preparation.prepare_packed(args, prepare)
        return packed

    def _padded(self) -> SampleIdCollator:
        """A collator that gives each row a batch row."""
        return preparation.padding_collator(self.data_collator, self.padding_free)

    def _rows(self) -> Rows:
        """The prepared training rows, one by one; of a stream, those read to choose by."""
        args, processes = self.args, self.accelerator.num_processes
        if self.data.streams or not args.packing:
            self.train_dataset = with_scored_tokens(self.train_dataset)
        if self.data.streams:
            rows, self.data.groups = preparation.stream_sample(
                args, self.train_dataset, self._padded(), args.train_batch_size * processes, self.data.groups
            )
            return rows
        prepared = self.train_dataset if self._unpacked is None else self._unpacked
        count = len(self.data.rows)
        checks.check_rows(args, prepared, count, self.model, self.merges_rows, len(self.train_dataset), processes)
        return preparation.told_of_dropped(preparation.readable_rows(args, prepared, self._padded(), count))

    def _trusted(self, formatting: Any) -> TrustedSets | None:
        """The trusted rows, prepared as the training rows are."""
        args = self.args
        # In the caller's order: which rows are held back depends on it.
        ordered = copy.copy(args)
        ordered.shuffle_dataset = False

        def prepare(rows: Dataset, name: str) -> Dataset:
            if self._skip_prepare_dataset:
                return rows
            return self._prepare_dataset(rows, self.processing_class, ordered, False, formatting, f"validation {name}")

        completions = self.completion_only_loss and not args.assistant_only_loss
        sets, shares = self.data.trusted, self.data.shares
        trusted = preparation.prepared_trusted(args, sets, shares, self.rows, prepare, completions, self._padded())
        if trusted is not None and self.rows is not None and self.mode.learns and not args.published:
            check_sizes(self.rows, trusted)
        return trusted

    def _check(self, args: BilevelSFTConfig) -> None:
        processes = self.accelerator.num_processes
        checks.check_settings(args, self.mode.weighs_losses, self.compute_loss_func, processes)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        checks.check_model(args, self.model, self.accelerator, self._is_vision_dataset or self._is_vlm, sharded)
        if self.data.streams and self.mode.learns:
            checks.check_stream_model(self.model, self.data.groups is not None)

    # Weights

    def choose_weights(self, **how: Any) -> None:
        """As the parent's, for groups of rows and for streams too."""
        groups = self.data.groups
        of_row = None if groups is None else groups.of_row
        super().choose_weights(groups=of_row, **how)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Choose weights, then the parent's `train`; `resume_from_checkpoint=True` takes the newest complete one."""
        folder = resume_point(resume_from_checkpoint, self.args.output_dir, WEIGHT_FILES if self.mode.weighs else [])
        self.record.begin(resumed=isinstance(folder, str))
        if self.weights is not None and isinstance(folder, str):
            self.weights.load(folder)
        self.choose_weights()
        self._objective = self._make_objective()
        self.record.chosen()
        return super().train(folder, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.weights is None or self.rows is None or not self.mode.resamples:
            return super()._get_train_sampler(train_dataset)
        rows, weights = self.rows, self.weights
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        epoch = lambda: int(self.state.epoch or 0)  # noqa: E731 (a name of three words would say no more)
        return WeightedSampler(rows.order(self.args.seed), lambda: weights.of(rows.ids), epoch, seed)

    # Weighted losses, and trusted rows in the objective

    def _make_objective(self) -> WeightedObjective | None:
        """What makes a step's loss the weighted one; None where TRL's own is right."""
        args, rows, trusted = self.args, self.rows, None
        if not self.mode.weighs_losses or rows is None:
            return None
        share = len(rows) / len(self.train_dataset) if args.packing else 1.0
        if self.trusted is not None and args.validation_loss_weight > 0:
            processes = self.accelerator.num_processes
            per_step = round(share * args.train_batch_size * args.gradient_accumulation_steps * processes)
            pad = self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0
            weight = args.validation_loss_weight
            trusted = TrustedPart.of(self.trusted, self.data_collator, weight, per_step // 4, args.seed, pad)
        weights = None if self.mode.resamples else self.weights
        counted = weights is not None and not self.data.streams
        packed = self.train_dataset if args.packing else None
        tokens = scored_tokens(rows.dataset, packed, rows.count) if counted else torch.zeros(0)
        return WeightedObjective(
            weights=weights,
            scale=weights.loss_scale(tokens) if weights is not None and counted else 1.0,
            trusted=trusted,
            moving=self.weights if args.published else None,
            model=self._reader(),
            processes=Processes.now(),
        )

    def _step_facts(self) -> StepFacts:
        rate = float(self.optimizer.param_groups[0]["lr"])
        return StepFacts(self.state.global_step, self.state.max_steps, self.args.gradient_accumulation_steps, rate)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The parent's micro-batches of an optimizer step."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step, self._pending = None, (batches, num_items)
        return batches, num_items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The parent's step on the micro-batch, with its trusted rows and factors."""
        if self._objective is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._step is None:
            # Not earlier: on a resumed run the random state is restored only after the batches have been drawn.
            model.train()
            batches = [self._prepare_inputs(batch) for batch in self._pending[0]]
            self._step = self._objective.begin(batches, self._pending[1], self._step_facts())
        step = self._step
        loss = super().training_step(model, step.next_inputs, num_items_in_batch)
        if step.complete:
            self._finish(self._objective, step)
        return loss

    def _finish(self, objective: WeightedObjective, step: WeightedStep) -> None:
        if step.trusted_losses:
            self._metrics["train"]["validation_loss"].append(torch.cat(step.trusted_losses).mean().item())
        bad = objective.finish(step, self._step_facts())
        if len(bad):
            self._save_checkpoint(self.model, trial=None)
            # The first process may still be writing.
            self.accelerator.wait_for_everyone()
            raise not_finite(bad, self.state.global_step, self.args.output_dir)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The parent's loss; where rows have factors, on log-probabilities that were multiplied by them."""
        ids, segments = inputs.pop(SAMPLE_ID, None), inputs.pop(SEGMENTS, None)
        factor, step = inputs.pop(ROW_FACTOR, None), self._step
        if factor is None or step is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def weighted_model(**kwargs: Any) -> Any:
            return step.weigh(model(**kwargs), ids, segments, factor)

        return super().compute_loss(weighted_model, inputs, return_outputs, num_items_in_batch)

    # Logs and files

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.mode.weighs_losses and SAMPLE_ID not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SAMPLE_ID, SAMPLE_LENGTHS]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log, with statistics of the weights while training."""
        if self.weights is not None and self.model.training and "loss" in logs:
            logs.update(self.weights.metrics())
        super().log(logs, start_time)

    def _facts(self) -> RunFacts:
        """What the record of this run is made of."""
        return RunFacts(
            kind="sft",
            args=self.args,
            state=self.state,
            model=self.model,
            weights=self.weights,
            trusted=self.trusted,
            learned=self.mode.learns,
            resampled=self.mode.resamples,
            rows=len(self.data.rows) if not self.data.streams else (0 if self.rows is None else self.rows.count),
            streamed=self.data.streams,
            fingerprints=self._fingerprints,
        )
