"""[`BilevelSFTTrainer`]: TRL's SFT trainer with a learned loss weight per training row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from ..core.scores import row_losses
from ..data.cards import CITATION, PAPER_ID, PAPER_TITLE
from ..data.export import weighted_dataset
from ..data.identity import (
    SAMPLE_ID,
    SAMPLE_LENGTHS,
    SEGMENTS,
    SampleIdCollator,
    fingerprint,
    sample_ids,
)
from ..data.sampling import WeightedSampler, content_order
from ..data.streams import weighted_stream
from ..estimators.base import Estimator
from . import checks, setup
from .amortise import check_states, predict_weights, stream_predictor
from .checkpoints import resume_point
from .errors import NonFiniteScoreError, row_list
from .estimator import make_estimator
from .host import TrainerHost
from .pilot import make_pilot
from .quantization import disable_bf16_repacking
from .record import RecordCallback, add_selection_to_card
from .selection import STATE_FILE, SUMMARY_FILE, Selection
from .trackers import track_weights
from .window import ROW_FACTOR, StepWindow


class BilevelSFTTrainer(SFTTrainer):
    """
    Trainer for supervised fine-tuning on data of mixed quality, guided by a small trusted validation set.

    Learns a loss weight per training row (or per group of rows) such that the model trained on the weighted rows has
    the least validation loss (bilevel data selection, https://huggingface.co/papers/2511.21056), and trains the model
    on `lambda * L_val + (1 - lambda) * L_train`, where `L_train` is TRL's mean loss per token with the loss of
    row `i` multiplied by its weight `w_i` (or row `i` visited `w_i` times as often).

    Example:

    ```python
    from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

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
            As for [`~trl.SFTTrainer`]; all of its arguments are taken. `eval_dataset` only reports: it never touches
            the weights.
        args ([`BilevelSFTConfig`], *optional*):
            Configuration. A plain [`~trl.SFTConfig`] is taken too, with the defaults of the upper level.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of mixed quality, in any text format that [`~trl.SFTTrainer`] takes. Weights are learned for its rows;
            with `weight_estimator="none"` a column `data_weight` (as `weighted_dataset` writes it) gives fixed ones.
            A stream's rows are told apart by a key (`selector_key_column`) or belong to groups; see docs/scale.md.
        validation_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Trusted rows that say what good means, in the same formats; several sets make several objectives
            (`args.validation_weights`). Needed unless `weight_estimator="none"` and `validation_loss_weight=0`.

    Raises:
        ValueError, TypeError: for input that cannot work; the message names the argument, the value and the remedy.

    Differs from [`~trl.SFTTrainer`] in that the rows' numbers travel to the loss, validation rows join each training
    batch, every row's log-probabilities are multiplied by its weight before TRL sums them, and the selector is saved
    with the model. With `weight_estimator="none"` and `validation_loss_weight=0` it *is* `SFTTrainer`.
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
        args = setup.resolve_config(args, model)
        train_dataset, fixed_weights = checks.take_weights(args, train_dataset)
        formatted = sft_arguments.get("formatting_func") is not None
        validation = checks.check_datasets(args, train_dataset, validation_dataset, formatted)
        assert train_dataset is not None
        self.streams = isinstance(train_dataset, IterableDataset)
        # Of a stream: rows of its sample, which is read after preparation.
        self.row_count = 0 if isinstance(train_dataset, IterableDataset) else len(train_dataset)
        self._unpacked: Dataset | None = None
        self._caller_rows = train_dataset
        # Plain SFT needs no row numbers, and must not stumble over them (packing and padding-free merge rows).
        self.weighs = args.weight_estimator != "none" or fixed_weights is not None
        self._tracks_rows = self.weighs or args.validation_loss_weight > 0
        self._numbered = setup.with_ids(args, train_dataset) if self._tracks_rows else train_dataset
        if self.streams and self._tracks_rows:
            checks.check_stream(args)
        super().__init__(
            model,
            args,
            data_collator,
            self._numbered,
            setup.without_numbers(eval_dataset) if self._tracks_rows else eval_dataset,
            processing_class,
            **sft_arguments,
        )
        table = setup.read_sample(self) if self.streams else None
        checks.check_supported(self)
        disable_bf16_repacking(self.model)
        self.row_collator = SampleIdCollator(setup.padding_collator(self))
        if self._tracks_rows:
            self.data_collator = SampleIdCollator(self.data_collator, self.merges_rows)
            if not (self.args.packing or self.streams):
                self.train_dataset = setup.with_scored_tokens(self.train_dataset)
        kept = setup.kept_rows(self)
        self.selection = Selection(
            args,
            kept,
            groups=setup.make_row_groups(args, train_dataset),
            fingerprint=setup.train_fingerprint(self),
            validation_fingerprint=" ".join(f"{name} {fingerprint(rows)}" for name, rows in validation.items()),
            device=args.device,
            table=table,
        )
        if fixed_weights is not None:
            checks.check_kept_weights(fixed_weights, kept)
            self.selection.set_weights(fixed_weights)
        formatting = sft_arguments.get("formatting_func")
        self.validation, self.pulling = setup.prepare_validation(self, validation, formatting)
        self.estimator: Estimator | None = None
        self._order: Tensor | None = None
        self._window: StepWindow | None = None
        self.add_callback(RecordCallback(self))
        self.add_callback(setup.StartCallback(self))
        track_weights(self)

    # What a user asks for

    def sample_weights(self) -> Tensor:
        """Weights of the caller's rows, float32 `[len(train_dataset)]` on the CPU, in the caller's order.

        Mean one over the rows that are trained on; NaN for rows that preparation dropped (longer prompts than
        `max_length`, say).

        Raises:
            ValueError: for a stream, whose rows have no number.
        """
        if self.streams:
            raise ValueError(
                "The rows of a stream have no number, so there is no list of weights. Use `weighted_dataset()`, a "
                "stream of the rows with their weights."
            )
        return self.selection.all_weights()

    def weighted_dataset(self, top_k: int | None = None) -> Dataset | IterableDataset:
        """The caller's rows with `sample_id`, `data_weight` and `data_rank` (0 is the highest weight).

        Of a stream: a stream with `sample_id` and `data_weight`, NaN for rows (or groups) not seen in training.

        Args:
            top_k (`int`, *optional*): only the rows of the `top_k` highest weights, in the caller's order.
        """
        if isinstance(self._caller_rows, IterableDataset):
            if top_k is not None:
                raise ValueError(f"`top_k={top_k}` needs rows that can be ranked, and `train_dataset` is a stream.")
            args = self.args
            column = setup.key_column(args)
            return weighted_stream(self._caller_rows, column, args.selector_table_size, self.selection.seen_weights)
        return weighted_dataset(self._caller_rows, self.sample_weights(), top_k)

    def validation_loss(self) -> dict[str, float]:
        """Loss of each validation set (mean over rows of the mean per token, in nats), and their weighted `"total"`.

        Independent of batch size and number of processes: every process computes all rows.
        """
        if self.validation is None:
            raise ValueError("There is no validation loss: the trainer has no `validation_dataset`.")
        losses = {name: float(self.row_losses(rows).mean()) for name, rows in self.validation.datasets.items()}
        return losses | {"total": sum(self.validation.weights[name] * loss for name, loss in losses.items())}

    def row_losses(self, dataset: Dataset) -> Tensor:
        """Mean loss per token of every row of a dataset under the present model, float32 `[rows]` on the CPU, in nats.

        Args:
            dataset (`Dataset`): in any format the trainer takes; rows that preparation drops give no entry.
        """
        return setup.evaluate_rows(self, dataset)

    # Rows

    @property
    def rows(self) -> Dataset:
        """The prepared training rows, one by one; of a stream, its sample.

        `train_dataset` holds them packed with `packing=True`.
        """
        return self.train_dataset if self._unpacked is None else self._unpacked

    @property
    def merges_rows(self) -> bool:
        """True if a row of a training batch may hold several rows (packing, padding-free)."""
        return self.args.packing or self.padding_free

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
        numbered = dataset is self._numbered
        if not (self._tracks_rows and packing and numbered):
            if self._tracks_rows and not numbered:
                dataset = setup.without_numbers(dataset)
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

        def prepare(settings: SFTConfig) -> Dataset:
            return super(BilevelSFTTrainer, self)._prepare_dataset(
                dataset, processing_class, settings, False, formatting_func, dataset_name
            )

        self._unpacked, packed = setup.prepare_packed(args, prepare)
        return packed

    def row_order(self) -> Tensor:
        """Positions in `rows`, in an order given by the rows' content, int64 `[rows kept]`."""
        if self._order is None:
            self._order = content_order(self.rows, self.args.seed)
        return self._order

    def collate_rows(self, rows: list[int]) -> dict[str, Any]:
        """Some of `rows`, by position, as a padded batch on the device."""
        columns = setup.row_columns(self.args, self.rows)
        batch = self.row_collator([{k: v for k, v in self.rows[row].items() if k in columns} for row in rows])
        return self._prepare_inputs(batch)

    # The training step

    @property
    def selects(self) -> bool:
        """True if weights are learned (`weighs` is true for fixed ones, too)."""
        return self.args.weight_estimator != "none"

    @property
    def resamples(self) -> bool:
        """True if weights act through how often a row is visited."""
        return self.weighs and self.args.selector_weighting == "resample" and not self.streams

    @property
    def predicts(self) -> bool:
        """True if weights are predicted as rows come: those of a stream, by the pilot on its sample."""
        calibrated = self.selects and self.args.selector_update == "calibrated"
        return self.streams and calibrated and self.args.selector_granularity == "sample"

    @property
    def trains_validation(self) -> bool:
        """True if the model is trained on the validation rows."""
        return self.validation is not None and self.args.validation_loss_weight > 0

    @property
    def learns_online(self) -> bool:
        """True if weights are learned from the scores of batches in training, not calibrated before it."""
        return self.selects and self.args.selector_update != "calibrated"

    @property
    def updates_online(self) -> bool:
        """True if the coming step takes scores of its batch into the selector."""
        freeze = self.args.selector_freeze_step
        frozen = freeze is not None and self.state.global_step >= freeze
        return self.learns_online and not frozen

    def start_selection(self) -> None:
        """When training starts, with the model in place: make the estimator, or run the pilot if it has not run."""
        if not self.selects:
            return
        if self.args.selector_update == "calibrated":
            if self.selection.calibrated:
                return
            check_states(self)
            scores = make_pilot(self).run()
            if self.predicts:
                self.selection.fit_predictor(*scores, partial(stream_predictor, self))
            else:
                self.selection.calibrate(*scores, partial(predict_weights, self), self.args.pilot_smoothing)
        elif self.estimator is None:
            self.estimator = make_estimator(self.args, TrainerHost(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.resamples:
            return super()._get_train_sampler(train_dataset)
        return self.weighted_sampler(lambda: int(self.state.epoch or 0))

    def weighted_sampler(self, epoch: Callable[[], int]) -> WeightedSampler:
        """Draws from `rows` in proportion to their weights; `epoch` numbers the passes."""
        ids = sample_ids(self.rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return WeightedSampler(self.row_order(), lambda: self.selection.weights(ids).cpu(), epoch, seed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The parent's micro-batches of an optimizer step; a window looks after them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = StepWindow(self, batches, num_items) if self.weighs or self.trains_validation else None
        return batches, num_items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The parent's step on the micro-batch with its validation rows and factors; the last one moves weights."""
        window = self._window
        if window is None:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = window.next_inputs()
        with window.watch():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if window.complete:
            window.finish()
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The parent's loss, on log-probabilities that were multiplied by each row's factor."""
        ids = inputs.pop(SAMPLE_ID, None)
        segments = inputs.pop(SEGMENTS, None)
        factor = inputs.pop(ROW_FACTOR, None)
        if factor is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        window = self._window
        assert window is not None

        def weighted_model(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            window.attach(outputs.log_probs, outputs.label_mask)
            places = None if segments is None else segments[:, 1:]
            losses = row_losses(outputs.log_probs.detach(), outputs.label_mask, places, len(factor)).means()
            rows = (factor * window.observe(ids, losses)).to(outputs.log_probs.dtype)
            outputs.log_probs = outputs.log_probs * (rows.unsqueeze(-1) if places is None else rows[places])
            return outputs

        return super().compute_loss(weighted_model, inputs, return_outputs, num_items_in_batch)

    def stop_on_non_finite(self, ids: Tensor) -> None:
        """Save the state before this step, and raise `NonFiniteScoreError` naming the rows."""
        self._save_checkpoint(self.model, trial=None)
        # The first process may still be writing.
        self.accelerator.wait_for_everyone()
        step = self.state.global_step
        rows = f"Training rows (sample_id) {row_list(ids)}" if len(ids) else "Validation rows"
        raise NonFiniteScoreError(
            f"{rows} have a NaN or infinite loss or score at step {step}. The "
            f"state before this step is saved in {self.args.output_dir}/checkpoint-{step}. Look at these rows; or "
            "lower the learning rate, or use bf16 in place of fp16."
        )

    # Logs and files

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._tracks_rows and SAMPLE_ID not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SAMPLE_ID, SAMPLE_LENGTHS]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log, with the selector's statistics while training; processes compare their weights."""
        if self.weighs and self.model.training and "loss" in logs:
            checks.check_agreement(self)
            logs.update(self.selection.metrics())
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's `train`; `resume_from_checkpoint=True` takes the newest checkpoint that is complete."""
        files = [STATE_FILE, SUMMARY_FILE] if self.weighs else []
        return super().train(resume_point(resume_from_checkpoint, self.args.output_dir, files), *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's files, and the selector's state beside them; none that another run left there."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        if self.weighs:
            tensors = {} if self.estimator is None else self.estimator.tensors()
            self.selection.save(folder, tensors)
        else:
            for name in (STATE_FILE, SUMMARY_FILE):
                (Path(folder) / name).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card, with a section on the selection: method, settings, data, results."""
        super().create_model_card(*args, **kwargs)
        add_selection_to_card(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        dtypes = setup.trainable_dtypes(self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        setup.restore_dtypes(self.model, dtypes)
        if self.weighs:
            tensors = self.selection.load(resume_from_checkpoint)
            if tensors:
                self.estimator = make_estimator(self.args, TrainerHost(self))
                self.estimator.load_tensors(tensors)
