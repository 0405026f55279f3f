"""[`SelfRefineTrainer`]: rounds in which the model answers questions itself, guided by a small trusted set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from ..core.implicit import decide
from ..data.cards import CITATION, PAPER_ID, PAPER_TITLE
from ..data.checks import check_dataset, trusted_sets
from ..data.identity import without_numbers
from ..data.questions import QuestionSampler, choose_questions, questions_of
from ..data.rows import Rows
from ..data.trusted import TrustedSets
from ..weights.language_model import parameters_kept
from ..weights.lookahead import Lookahead
from ..weights.quantization import keep_4bit_weights
from ..weights.responses import Responses, score_responses
from ..weights.state import TrainingWeights
from . import checks
from .checkpoints import resume_point
from .choosing import ChoosesWeights
from .offline import OfflinePart, RefineRows, padding, read_rows
from .record import RecordCallback, RunFacts
from .rounds import SHAPE, RoundCallback, Rounds, Snapshot, checkpoint_files, is_exhausted
from .self_refine_config import SelfRefineConfig, check_contract, check_generation, resolved


class SelfRefineTrainer(ChoosesWeights, GRPOTrainer):
    """
    Trainer for online self-refining generation (arXiv 2511.21056), guided by a small trusted validation set.

    Works in rounds: questions whose offline answers weigh little are answered anew by the model, each response is
    weighted by how much likelier the trusted rows make it, offline rows, responses and trusted rows train together,
    and the model that fits the selection rows best is kept, else everything is rolled back.

    The objective is `lambda L_val + (1 - lambda) ((1 - rho) L_offline + rho L_responses)`, where `L_responses` is
    TRL's clipped policy loss with the advantage `u_q (w_g - 1)`: `w_g` the implicit weight of a response (mean one
    over those of its question), `u_q` the explicit weight of the question. It has the same expected gradient as
    weighted fine-tuning on the responses, with less variance.

    Example:

    ```python
    from trl_bilevel import SelfRefineConfig, SelfRefineTrainer

    trainer = SelfRefineTrainer(
        model=bilevel_trainer.model,
        args=SelfRefineConfig(output_dir="refined"),
        train_dataset=bilevel_trainer.weighted_dataset(),  # or plain rows: weights are learned first
        validation_dataset=trusted,
    )
    trainer.train()
    trainer.ledger
    ```

    Args:
        model, processing_class, callbacks, optimizers, quantization_config, peft_config:
            As for [`~trl.GRPOTrainer`]; `args` is a [`SelfRefineConfig`].
        train_dataset ([`~datasets.Dataset`]):
            Offline rows with the columns `prompt` and `completion` (text or messages). With a column `data_weight`
            (as `learn_weights` and `weighted_dataset` write it) these explicit weights are used; else they are learned
            before the first round, as `learn_weights` does.
        validation_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Trusted rows. Split into rows that drive scores and rows that select models, unless `selection_dataset` is
            given.
        selection_dataset ([`~datasets.Dataset`], *optional*):
            Trusted rows that choose between the candidates of a round.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Rows whose loss is reported in the ledger; they choose nothing.
        prompt_dataset ([`~datasets.Dataset`], *optional*):
            Questions without answers (`prompt`), asked in place of those of `train_dataset`.

    Raises:
        ValueError, TypeError: for input that cannot work; the message names the argument, the value and the remedy.
        ImportError: if the installed TRL lacks what rounds need.

    Generation, its back ends and the off-policy correction are TRL's. Files in `output_dir`: `_rows/ledger.jsonl`, an
    entry per round, and `_rows/responses/round-*.parquet`; neither is ever uploaded.
    """

    _tag_names = ["trl", "grpo", "trl-bilevel", "self-refine"]
    _name = "Self-Refine"
    _paper = {"title": PAPER_TITLE, "id": PAPER_ID, "citation": CITATION}
    rows: Rows
    trusted: TrustedSets
    weights: TrainingWeights

    def __init__(
        self,
        model: Any,
        args: SelfRefineConfig | None = None,
        train_dataset: Dataset | None = None,
        validation_dataset: Dataset | Mapping[str, Dataset] | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        *,
        selection_dataset: Dataset | None = None,
        prompt_dataset: Dataset | None = None,
        **grpo_arguments: Any,
    ):
        args = resolved(args, model)
        check_contract(GRPOTrainer)
        check_generation(args, grpo_arguments, model)
        questions = questions_of(train_dataset, prompt_dataset, args.question_strategy)
        sets = trusted_sets(validation_dataset)
        for name, rows in (("`selection_dataset`", selection_dataset), ("`eval_dataset`", eval_dataset)):
            if rows is not None:
                check_dataset(rows, name)
        super().__init__(
            model, self._implicit_weight, args, questions, processing_class=processing_class, **grpo_arguments
        )
        checks.check_model(args, self.model, self.accelerator, self._is_vlm)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "DeepSpeed and FSDP are not supported: rounds read and restore the whole model. Use DDP or a single "
                "GPU."
            )
        keep_4bit_weights(self.model)
        self.asks_own_rows = prompt_dataset is None
        assert train_dataset is not None
        self._caller_rows = without_numbers(train_dataset)
        prepared = RefineRows.of(args, self._read, train_dataset, sets, selection_dataset, eval_dataset)
        self.rows, self.trusted, self.selection = prepared.rows, prepared.trusted, prepared.selection
        self.eval_rows = prepared.report
        self.learns = prepared.given is None and args.weight_estimator != "none"
        self.weights = prepared.weights(args, self._caller_rows, sets, self.learns)
        self.offline = OfflinePart.of(args, prepared, self.weights, padding(self._tokenizer))
        self.lookahead = Lookahead(
            self._reader(), self.trusted, args.pilot_learning_rate, args.seed, args.gradient_checkpointing
        )
        shape = {name: getattr(args, name) for name in SHAPE} | {"processes": self.accelerator.num_processes}
        self.rounds = Rounds(shape, self.accelerator.process_index, self.accelerator.device)
        self._window: list[Any] = []
        self._round_start = time.perf_counter()
        report = None if self.eval_rows is None else self.eval_rows.dataset
        self.record = RecordCallback(self._facts, self._losses, report)
        # Rounds first: the record of the end is of the model that is kept.
        self.add_callback(RoundCallback(self.rounds, self._start, self.begin_round, self.end_round))
        self.add_callback(self.record)

    # What a user asks for

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """One entry per finished round: questions, responses, scores, losses of both candidates, the decision."""
        return self.rounds.ledger

    def row_losses(self, dataset: Dataset) -> Tensor:
        """Mean loss per token of every row of a dataset under the present model, float32 `[rows]` on the CPU, in nats.

        Args:
            dataset (`Dataset`): in any text format; rows that preparation drops give no entry.
        """
        return self._losses(self._read(dataset))

    def explicit_weights(self) -> Tensor:
        """Explicit weights of the questions, float32 `[questions]`; all one for a `prompt_dataset`."""
        return self.sample_weights() if self.asks_own_rows else torch.ones(len(self.train_dataset))

    # Weights

    def _read(self, rows: Dataset) -> Rows:
        """Rows, tokenised as the offline rows are."""
        return read_rows(self.args, self._tokenizer, rows)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Choose weights, then the parent's `train`; `resume_from_checkpoint=True` takes the newest complete one.

        A run whose patience was at its end is loaded, and not trained further.
        """
        files = checkpoint_files(self.accelerator.num_processes)
        folder = resume_point(resume_from_checkpoint, self.args.output_dir, files)
        if isinstance(folder, str):
            self.weights.load(folder)
            if is_exhausted(folder, self.args.patience):
                self._load_from_checkpoint(folder)
                self.state = TrainerState.load_from_json(f"{folder}/trainer_state.json")
                self.rounds.write_ledger(self.args.output_dir)
                return TrainOutput(self.state.global_step, float("nan"), {})
        self.record.begin(resumed=isinstance(folder, str))
        self.choose_weights()
        self.record.chosen()
        return super().train(folder, *args, **kwargs)

    # Questions and their responses

    def _get_train_sampler(self, dataset: Dataset | None = None) -> QuestionSampler:
        args = self.args
        return QuestionSampler(
            lambda: choose_questions(
                self.explicit_weights(), args.question_strategy, args.question_fraction, args.seed
            ),
            questions=args.generation_batch_size // args.num_generations,
            generations=args.num_generations,
            repeats=args.steps_per_generation,
            rounds=args.num_rounds,
            seed=args.seed,
        )

    def _implicit_weight(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        sample_id: list[int],
        **kwargs: Any,
    ) -> list[float]:
        """The reward that TRL is given: each response's implicit weight times its question's explicit weight."""
        args, number = self.args, len(self.ledger)
        responses = Responses.gathered(
            prompts,
            completions,
            completion_ids,
            sample_id,
            self._score_responses(self._tokenize_prompts(prompts)[0], completion_ids),
            ends={*self.eos_token_ids, self._tokenizer.pad_token_id},
            leaves_out_cut=self.mask_truncated_completions,
        )
        explicit = self.explicit_weights()[responses.questions]
        weighed = responses.weigh(explicit, args.num_generations, args.implicit_weight_temperature, number)
        self.rounds.generation = weighed.facts
        if self.accelerator.is_main_process:
            weighed.write(args.output_dir, number)
        start = self.accelerator.process_index * len(prompts)
        return weighed.weights[start : start + len(prompts)].tolist()

    def _score_responses(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
        """Scores of this process's responses, float32 `[n]` on the CPU."""
        self.lookahead.refresh(self.state.global_step)
        return score_responses(self.lookahead, self.rows.collate, prompt_ids, completion_ids)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's generation; parameters keep their values and dtypes."""
        with parameters_kept(self.model):
            return super()._generate_single_turn(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The parent's loss on the responses, and the offline and trusted rows of the micro-batch."""
        args = self.args
        policy = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return policy
        micro = self._step % args.gradient_accumulation_steps
        if micro == 0:
            self._window = self.offline.batches(self.state.global_step)
        batch, factor = self._window[micro]
        sums = self._reader().row_losses(batch).sums
        # Factors make up a sum over the processes, DDP takes the mean.
        offline = (factor.to(sums.device) * sums).sum() * self.accelerator.num_processes
        return (1 - args.validation_loss_weight) * args.online_loss_weight * policy + offline

    # Rounds

    def _start(self, step: int) -> None:
        """Training begins, or goes on after some steps."""
        self._step = step * self.args.gradient_accumulation_steps
        if step == 0:
            self.rounds.forget()
            self._buffered_inputs = None

    def begin_round(self) -> None:
        """Remember the way back, and how good the incoming model is."""
        self._round_start = time.perf_counter()
        if self.rounds.incoming is None:
            self.rounds.incoming = self._selection_losses()
        self.rounds.snapshot = Snapshot.take(self._trainable(), self.optimizer)

    def end_round(self) -> None:
        """Keep the trained model or go back to the incoming one, by the selection rows; write the ledger."""
        rounds = self.rounds
        assert rounds.incoming is not None and rounds.snapshot is not None
        trained = self._selection_losses()
        decision = decide(rounds.incoming, trained, self.selection.shares())
        if not decision.kept:
            rounds.snapshot.restore(self._trainable(), self.optimizer)
        report = None if self.eval_rows is None else float(self._losses(self.eval_rows).mean())
        facts = {"step": self.state.global_step, "seed": self.args.seed, "eval_loss": report}
        facts["seconds"] = round(time.perf_counter() - self._round_start, 1)
        entry = rounds.close(decision, trained, **facts)
        rounds.write_ledger(self.args.output_dir)
        # Not the parent's log: it would put the metrics of the step under way into this entry.
        Trainer.log(self, {f"round/{k}": float(v) for k, v in entry.items() if isinstance(v, bool | int | float)})

    def _losses(self, rows: Rows) -> Tensor:
        """Mean losses of prepared rows under the present model, float32 `[rows]`; the same on all processes."""
        losses = self._losses_of(rows)
        return self.accelerator.reduce(losses.to(self.accelerator.device), reduction="mean").cpu()

    def _selection_losses(self) -> Tensor:
        return torch.cat([self._losses(rows) for rows in self.selection.sets.values()])

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses of the present model in nats per token: of the selection rows, and of `eval_dataset` if there is one.

        In place of the parent's, which generates responses. Unlike `eval_loss` of other trainers, each row counts the
        same however long it is.
        """
        selection = self._selection_losses()
        metrics = {f"{metric_key_prefix}_selection_loss": float(selection @ self.selection.shares())}
        rows = self.eval_rows if eval_dataset is None else self._read(eval_dataset)
        if rows is not None:
            metrics[f"{metric_key_prefix}_loss"] = float(self._losses(rows).mean())
        Trainer.log(self, metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    # Files

    def _facts(self) -> RunFacts:
        """What the record of this run is made of."""
        return RunFacts(
            kind="refine",
            args=self.args,
            state=self.state,
            model=self.model,
            weights=self.weights,
            trusted=self.trusted,
            learned=self.learns,
            resampled=True,
            rows=self.rows.count,
            streamed=False,
            more={"asks_own_rows": self.asks_own_rows},
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the parent's files: it deletes older checkpoints once its own are written.
        folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
        in_round = self.rounds.snapshot is not None
        self.rounds.save(folder, (self._buffered_inputs or []) if in_round else [])
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._buffered_inputs = self.rounds.load(resume_from_checkpoint)  # type: ignore[assignment]
