"""[`SelfRefineTrainer`]: rounds in which the model answers questions itself, guided by a trusted validation set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from ..core.implicit import decide
from ..data.cards import CITATION, PAPER_ID, PAPER_TITLE
from ..data.questions import QuestionSampler, choose_questions
from . import refine_setup, responses, setup
from .checkpoints import resume_point
from .host import DetachedHost
from .offline import OfflinePart
from .pilot import pilot_learning_rate
from .record import RecordCallback, add_selection_to_card
from .round_callback import RoundCallback
from .rounds import Rounds, Snapshot
from .self_refine_config import SelfRefineConfig
from .trackers import track_weights


class SelfRefineTrainer(GRPOTrainer):
    """
    Trainer for online self-refining generation (arXiv 2511.21056), guided by a small trusted validation set.

    Works in rounds: questions whose offline answers weigh little are answered anew by the model, each response is
    weighted by how much it helps the validation loss, offline rows, responses and validation rows train together, and
    the model that fits the selection rows best is kept, else everything is rolled back.

    The objective is `lambda L_val + (1 - lambda) ((1 - rho) L_offline + rho L_responses)`, where `L_responses` is
    TRL's clipped policy loss with the advantage `u_q (w_g - 1)`: `w_g` the implicit weight of a response (mean one
    over those of its question), `u_q` the explicit weight of the question (with `implicit_weight_scope="round"` the
    round's mean of `u_q w_g` is taken off instead). It has the same expected gradient as weighted fine-tuning on the
    responses, with less variance.

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
            As for [`~trl.GRPOTrainer`].
        args ([`SelfRefineConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Offline rows with the columns `prompt` and `completion` (text or messages). With a column `data_weight`
            (as `BilevelSFTTrainer.weighted_dataset` writes it) these explicit weights are used; else a pilot run
            learns them before the first round.
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

    Generation, its back ends and the off-policy correction are TRL's. Files in `output_dir`: `ledger.jsonl`, an entry
    per round, and `responses/round-*.parquet`.
    """

    _tag_names = ["trl", "grpo", "trl-bilevel", "self-refine"]
    _name = "Self-Refine"
    _paper = {"title": PAPER_TITLE, "id": PAPER_ID, "citation": CITATION}

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
        args = refine_setup.resolve_config(args, model)
        questions = refine_setup.check_rows(args, train_dataset, prompt_dataset)
        refine_setup.check_reporting(eval_dataset)
        pulling, selecting = refine_setup.split_validation(args, validation_dataset, selection_dataset)
        refine_setup.check_generation(args, grpo_arguments, model)
        self.offline: OfflinePart
        super().__init__(
            model,
            self._implicit_weight,
            args,
            questions,
            processing_class=processing_class,
            **grpo_arguments,
        )
        refine_setup.check_template(self, questions)
        assert train_dataset is not None
        self.offline = OfflinePart(self.model, args, train_dataset, pulling, self.processing_class)
        self.selection_rows, self.selection_weights = refine_setup.prepare_selection(self.offline, args, selecting)
        self.eval_rows = None if eval_dataset is None else self._prepared(eval_dataset)
        sides = self.offline.validation.datasets, self.offline.trainer.train_dataset, self.eval_rows
        refine_setup.warn_of_overlaps(self.selection_rows, *sides)
        self._asks_own_rows = prompt_dataset is None
        # A tracker goes along with the model; a look-ahead takes its few steps as large as the pilot's.
        follows = args.response_estimator == "value_function"
        rate = self._present_learning_rate if follows else pilot_learning_rate(self.offline.trainer)
        self.scoring_host = DetachedHost(self.offline.trainer, self.offline.validation, rate)
        self.estimator = refine_setup.make_response_estimator(args, self.scoring_host)
        self.rounds = Rounds()
        self._window: list[Any] = []
        self._round_start = time.perf_counter()
        self.add_callback(RecordCallback(self))
        self.add_callback(RoundCallback(self))
        track_weights(self)
        if args.implicit_weight_scope == "round":
            # TRL takes the mean reward off each group: here that is the round.
            self.num_generations = args.generation_batch_size
        # As the parent left it, so that processes do not draw the same responses: the offline part has reset it.
        set_seed(args.seed, device_specific=True)

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """One entry per finished round: questions, responses, scores, losses of both candidates, the decision."""
        return self.rounds.ledger

    def _present_learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's `train`; `resume_from_checkpoint=True` takes the newest checkpoint that is complete.

        A run whose patience was at its end is loaded, and not trained further.
        """
        files = refine_setup.checkpoint_files(self.accelerator.num_processes)
        folder = resume_point(resume_from_checkpoint, self.args.output_dir, files)
        if isinstance(folder, str) and refine_setup.is_exhausted(folder, self.args.patience):
            self._load_from_checkpoint(folder)
            self.state = TrainerState.load_from_json(f"{folder}/trainer_state.json")
            if self.accelerator.is_main_process:
                self.rounds.write_ledger(self.args.output_dir)
            return TrainOutput(self.state.global_step, float("nan"), {})
        return super().train(folder, *args, **kwargs)

    # Questions and their responses

    def explicit_weights(self) -> Tensor:
        """Explicit weights of the questions, float32 `[questions]`; all one for a `prompt_dataset`."""
        return self.offline.weights() if self._asks_own_rows else torch.ones(len(self.train_dataset))

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
        scores = self._score_responses(self._tokenize_prompts(prompts)[0], completion_ids)
        return responses.weigh(self, prompts, completions, completion_ids, sample_id, scores)

    def _score_responses(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
        """Scores of this process's responses, float32 `[n]` on the CPU."""
        return responses.score(self, prompt_ids, completion_ids)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's generation; parameters keep their values and dtypes."""
        with responses.parameters_kept(self.model):
            return super()._generate_single_turn(*args, **kwargs)

    # The training step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The parent's loss on the responses, and the offline and validation rows of the micro-batch."""
        args = self.args
        micro = self._step % args.gradient_accumulation_steps
        if self.model.training and micro == 0:
            # Before the parent's forward: the tracker's own backward must not meet an armed DDP reducer.
            self._begin_step(self.state.global_step)
        policy = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return policy
        online = (1 - args.validation_loss_weight) * args.online_loss_weight
        batch, factor = self._window[micro]
        sums = self.offline.host.row_losses(batch).sums
        # Factors make up a sum over the processes, DDP takes the mean.
        offline = (factor.to(sums.device) * sums).sum() * self.accelerator.num_processes
        return online * policy + offline

    def _begin_step(self, step: int) -> None:
        args = self.args
        window = self.offline.window(step)
        self.scoring_host.step = step
        if args.response_estimator == "value_function":
            self.estimator.begin_step(window)
        training = (1 - args.validation_loss_weight) * (1 - args.online_loss_weight)
        self._window = self.offline.micro_batches(step, window, training, args.validation_loss_weight)

    # Rounds

    def begin_round(self) -> None:
        """Remember the way back, and how good the incoming model is."""
        self._round_start = time.perf_counter()
        if self.rounds.incoming is None:
            self.rounds.incoming = self._losses(self.selection_rows)
        self.rounds.snapshot = Snapshot.take(self._trainable(), self.optimizer, self.estimator)

    def forget_round(self) -> None:
        """Drop what is left of a round that was broken off."""
        self.rounds.snapshot = self.rounds.incoming = None
        self.rounds.rejected = 0
        self._buffered_inputs = None

    def end_round(self) -> None:
        """Keep the trained model or go back to the incoming one, by the selection rows; write the ledger."""
        rounds = self.rounds
        assert rounds.incoming is not None and rounds.snapshot is not None
        trained = self._losses(self.selection_rows)
        decision = decide(rounds.incoming, trained, self.selection_weights)
        if not decision.kept:
            rounds.snapshot.restore(self._trainable(), self.optimizer, self.estimator)
        report = None if self.eval_rows is None else float(self._losses(self.eval_rows).mean())
        facts = {"step": self.state.global_step, "seed": self.args.seed, "eval_loss": report}
        facts["seconds"] = round(time.perf_counter() - self._round_start, 1)
        entry = rounds.close(decision, trained, **facts)
        if self.accelerator.is_main_process:
            rounds.write_ledger(self.args.output_dir)
        # Not the parent's log: it would put the metrics of the step under way into this entry.
        Trainer.log(self, {f"round/{k}": float(v) for k, v in entry.items() if isinstance(v, bool | int | float)})

    def _losses(self, rows: Dataset) -> Tensor:
        """Losses of prepared rows, the same on all processes."""
        losses = setup.evaluate_rows(self.offline.trainer, rows).to(self.accelerator.device)
        return self.accelerator.reduce(losses, reduction="mean").cpu()

    def _prepared(self, rows: Dataset) -> Dataset:
        return setup.prepare_rows(self.offline.trainer, refine_setup.with_template(self.args, rows))

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Losses of the present model in nats per token: of the selection rows, and of `eval_dataset` if there is one.

        In place of the parent's, which generates responses. Unlike `eval_loss` of other trainers, each row counts the
        same however long it is.
        """
        selection = self._losses(self.selection_rows)
        metrics = {f"{metric_key_prefix}_selection_loss": float(selection @ self.selection_weights)}
        rows = self.eval_rows if eval_dataset is None else self._prepared(eval_dataset)
        if rows is not None:
            metrics[f"{metric_key_prefix}_loss"] = float(self._losses(rows).mean())
        Trainer.log(self, metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    # Files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's files, and the selector's state beside them."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.offline.trainer.selection.save(output_dir or self.args.output_dir, {})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card, with a section on the selection: method, settings, data, results."""
        super().create_model_card(*args, **kwargs)
        add_selection_to_card(self)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the parent's files: it deletes older checkpoints once its own are written.
        folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
        refine_setup.save_rounds(self, folder)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        dtypes = setup.trainable_dtypes(self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        setup.restore_dtypes(self.model, dtypes)
        self.offline.trainer.selection.load(resume_from_checkpoint)
        refine_setup.load_rounds(self, resume_from_checkpoint)
