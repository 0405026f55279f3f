"""[`BilevelSFTTrainer`]: TRL's SFT trainer with a learned loss weight per training row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from ..core.schedule import validation_loss_weight
from ..core.scores import row_losses
from ..data.export import weighted_dataset
from ..data.identity import SAMPLE_ID, SampleIdCollator, add_sample_ids, fingerprint
from ..data.sampling import WeightedSampler, content_order
from ..estimators.base import Estimator, mean_losses
from . import setup
from .host import TrainerHost
from .quantization import disable_bf16_repacking
from .selection import Selection

logger = logging.getLogger(__name__)

ROW_FACTOR = "row_factor"


class NonFiniteScoreError(RuntimeError):
    """A training row got a NaN or infinite loss or score. A checkpoint of the last good step has been written."""


class BilevelSFTTrainer(SFTTrainer):
    """
    Trainer for supervised fine-tuning on data of mixed quality, guided by a small trusted validation set.

    Learns a loss weight per training row (or per group of rows) such that the model trained on the weighted rows has
    the least validation loss (bilevel data selection, https://huggingface.co/papers/2511.21056), and trains the model
    on `lambda * L_val + (1 - lambda) * mean_i w_i ell_i`.

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
        train_dataset ([`~datasets.Dataset`]):
            Rows of mixed quality, in any text format that [`~trl.SFTTrainer`] takes. Weights are learned for its rows.
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
    _paper = {
        "title": "Bilevel Data Curation for LLM Fine-tuning: Offline Selection and Online Self-Refining Generation",
        "id": "2511.21056",
    }
    # `compute_loss` divides by the tokens of the whole accumulation window itself, like its parent.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        validation_dataset: Dataset | Mapping[str, Dataset] | None = None,
        **sft_arguments: Any,
    ):
        args = setup.resolve_config(args, model)
        validation = setup.check_datasets(args, train_dataset, validation_dataset)
        assert train_dataset is not None
        self.row_count = len(train_dataset)
        self._caller_rows = train_dataset
        super().__init__(
            model,
            args,
            data_collator,
            add_sample_ids(train_dataset),
            eval_dataset,
            processing_class,
            **sft_arguments,
        )
        setup.check_supported(self)
        disable_bf16_repacking(self.model)
        self.data_collator = SampleIdCollator(self.data_collator)

        kept = torch.zeros(self.row_count, dtype=torch.bool)
        kept[torch.as_tensor(self.train_dataset[SAMPLE_ID])] = True
        setup.report_dropped(kept, self.accelerator.num_processes * args.train_batch_size)
        self.selection = Selection(
            args,
            kept,
            groups=setup.make_row_groups(args, train_dataset),
            fingerprint=fingerprint(train_dataset),
            device=args.device,
        )
        self.validation = setup.prepare_validation(self, validation, sft_arguments.get("formatting_func"))
        self.estimator: Estimator | None = None
        self._order: Tensor | None = None
        self._reset_window()
        self.add_callback(setup.StartCallback(self))

    # What a user asks for

    def sample_weights(self) -> Tensor:
        """Weights of the caller's rows, float32 `[len(train_dataset)]` on the CPU, in the caller's order.

        Mean one over the rows that are trained on; NaN for rows that preparation dropped (longer prompts than
        `max_length`, say).
        """
        return self.selection.all_weights()

    def weighted_dataset(self, top_k: int | None = None) -> Dataset:
        """The caller's rows with `sample_id`, `data_weight` and `data_rank` (0 is the highest weight).

        Args:
            top_k (`int`, *optional*): only the rows of the `top_k` highest weights, in the caller's order.
        """
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

    # The training step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Before an optimizer step: its training batches, joined by its validation rows."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._reset_window()
        if self.selects or self.trains_validation:
            self._window = batches
            self._window_tokens = num_items
        return batches, num_items

    @property
    def selects(self) -> bool:
        """True if weights are learned."""
        return self.args.weight_estimator != "none"

    @property
    def trains_validation(self) -> bool:
        """True if the model is trained on the validation rows."""
        return self.validation is not None and self.args.validation_loss_weight > 0

    @property
    def resamples(self) -> bool:
        """True if weights act through how often a row is visited."""
        return self.selects and self.args.selector_weighting == "resample"

    def row_order(self) -> Tensor:
        """Positions in the prepared training set, in an order given by the rows' content, int64 `[rows kept]`."""
        if self._order is None:
            self._order = content_order(self.train_dataset, self.args.seed)
        return self._order

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.resamples:
            return super()._get_train_sampler(train_dataset)
        ids = torch.as_tensor(self.train_dataset[SAMPLE_ID])
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return WeightedSampler(
            self.row_order(), lambda: self.selection.weights(ids).cpu(), lambda: int(self.state.epoch or 0), seed
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The parent's step; the first one of a window prepares the weights and validation rows of all of them."""
        if self._window and self._micro == 0:
            self._begin_window()
        if self._joined:
            inputs = self._joined[self._micro]
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The parent's loss, on log-probabilities that were multiplied by each row's weight."""
        ids = inputs.pop(SAMPLE_ID, None)
        factor = inputs.pop(ROW_FACTOR, None)
        if factor is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def weighted_model(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            losses = mean_losses(*row_losses(outputs.log_probs.detach(), outputs.label_mask))
            weights = self._observe(ids, losses)
            rows = torch.cat([factor[: len(weights)] * weights, factor[len(weights) :]])
            outputs.log_probs = outputs.log_probs * rows.to(outputs.log_probs.dtype).unsqueeze(-1)
            return outputs

        loss = super().compute_loss(weighted_model, inputs, return_outputs, num_items_in_batch)
        self._micro += 1
        if self._micro == len(self._window):
            self._end_window()
        return loss

    def _reset_window(self) -> None:
        self._window: list[Any] = []
        self._window_tokens: Any = None
        self._joined: list[dict[str, Any]] = []
        self._references: list[Tensor] | None = None
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._validation_losses: list[Tensor] = []
        self._micro = 0

    def _begin_window(self) -> None:
        """Reference losses and validation rows: all that comes before the first forward of an optimizer step."""
        step = self.state.global_step
        if self.updates_online:
            assert self.estimator is not None
            self.model.train()
            self._references = self.estimator.begin_step(self._window)
        weight = self._current_lambda() if self.trains_validation else 0.0
        drawn = None
        if weight > 0 and step % self.args.validation_every == 0:
            drawn = self.validation.step_batch(step, len(self._window), self.args.process_index, self.args.world_size)
        for micro, batch in enumerate(self._window):
            factor = torch.full((len(batch["input_ids"]),), 1.0 - weight)
            joined = dict(batch)
            if drawn is not None and (rows := drawn.batches[micro]) is not None:
                # The parent divides all sums by the tokens of the training rows.
                tokens = float(self._window_tokens) * self.args.validation_every
                factor = torch.cat([factor, weight * tokens * drawn.row_weights[micro]])
                joined = self.validation.join(batch, rows)
            joined[ROW_FACTOR] = factor
            self._joined.append(joined)

    def start_selection(self) -> None:
        """At the start of training, with the model in place: the estimator, or the pilot run where it is still to be
        done.
        """
        if not self.selects:
            return
        if self.args.selector_update == "calibrated":
            if not self.selection.calibrated:
                self.selection.calibrate(*setup.make_pilot(self).run())
        elif self.estimator is None:
            self.estimator = setup.make_estimator(self.args, TrainerHost(self))

    @property
    def updates_online(self) -> bool:
        """True if the coming step takes scores of its batch into the selector."""
        freeze = self.args.selector_freeze_step
        frozen = freeze is not None and self.state.global_step >= freeze
        return self.selects and self.args.selector_update != "calibrated" and not frozen

    def _current_lambda(self) -> float:
        args = self.args
        epoch = float(self.state.epoch or 0.0)
        return validation_loss_weight(args.validation_loss_weight, args.validation_loss_weight_decay, epoch)

    def _observe(self, ids: Tensor, losses: Tensor) -> Tensor:
        """Record what a forward says of its rows; weights `[b]` of its training rows (validation rows come last)."""
        count = len(self._window[self._micro]["input_ids"])
        ids = ids[:count]
        if len(losses) > count:
            self._validation_losses.append(losses[count:].mean())
        if self.updates_online:
            assert self.estimator is not None
            reference = None if self._references is None else self._references[self._micro]
            if reference is not None or not self.estimator.needs_reference:
                self._scores.append((ids, self.estimator.score(losses[:count], reference)))
        if not self.selects or self.resamples:
            return torch.ones(count, device=losses.device)
        return self.selection.weights(ids).to(losses.device)

    def _end_window(self) -> None:
        """After the last forward of an optimizer step: log, and move the selector by the scores of all processes."""
        if self._validation_losses:
            self._metrics["train"]["validation_loss"].append(torch.stack(self._validation_losses).mean().item())
        if not self._scores:
            return
        ids, scores = (torch.cat(parts) for parts in zip(*self._scores, strict=True))
        ids, scores = self._gather(ids), self._gather(scores)
        finite = torch.isfinite(scores)
        if not bool(finite.all()):
            self._stop_on_non_finite(ids[~finite])
        if self.state.global_step >= setup.warmup_steps(self):
            self.selection.update(ids, scores)
            if self.args.filter_rate and self.state.global_step % setup.GATE_REFRESH_STEPS == 0:
                self.selection.refresh_gate()

    def _gather(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        values = self.accelerator.pad_across_processes(values, dim=0, pad_index=-1)
        return self.accelerator.gather(values)

    def _stop_on_non_finite(self, ids: Tensor) -> None:
        self._save_checkpoint(self.model, trial=None)
        raise NonFiniteScoreError(
            f"Training rows (sample_id) {sorted(set(ids.tolist()))[:20]} have a NaN or infinite score at step "
            f"{self.state.global_step}. The state before this step is saved in {self.args.output_dir}/checkpoint-"
            f"{self.state.global_step}. Look at these rows; or lower the learning rate, or use bf16 in place of fp16."
        )

    # Logs and files

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SAMPLE_ID not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, SAMPLE_ID]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log, with the selector's statistics while training."""
        if self.selects and self.model.training and "loss" in logs:
            logs.update(self.selection.metrics())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's files, and the selector's state beside them."""
        super().save_model(output_dir, _internal_call)
        if self.selects and self.args.should_save:
            tensors = {} if self.estimator is None else self.estimator.tensors()
            self.selection.save(output_dir or self.args.output_dir, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT loads a QLoRA adapter in fp32; training had it in bf16, and goes on exactly only there.
        for name, parameter in self.model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])
        if self.selects:
            tensors = self.selection.load(resume_from_checkpoint)
            if tensors:
                self.estimator = setup.make_estimator(self.args, TrainerHost(self))
                self.estimator.load_tensors(tensors)
