"""The trainer beside what users bring: callbacks, metrics, collators, early stopping, the best model, optimizers."""

import pytest
import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.conftest import base_arguments, losses, parameters
from trl_bilevel import BilevelSFTTrainer

LEARNED = {}
PILOT = {"weight_estimator": "value_function", "pilot_learning_rate": 1e-2}
FIXED = {"weight_estimator": "none", "validation_loss_weight": 0.0}


@pytest.fixture
def build(config, tiny_model, tokenizer, train_rows, validation_rows, rows):
    def make(train=None, arguments=None, **overrides):
        settings = (FIXED if train is not None else LEARNED) | overrides
        return BilevelSFTTrainer(
            tiny_model(),
            config(**settings),
            train_dataset=train_rows if train is None else train,
            validation_dataset=validation_rows,
            eval_dataset=validation_rows.select(range(8)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            **(arguments or {}),
        )

    return make


@pytest.fixture
def weighted(train_rows):
    return train_rows.add_column("data_weight", [n / 20 for n in range(len(train_rows))])


class Notes(TrainerCallback):
    """Writes down what a user's callback is told."""

    def __init__(self):
        self.events, self.logs = [], []

    def on_train_begin(self, args, state, control, model=None, processing_class=None, train_dataloader=None, **kwargs):
        assert model is not None and processing_class is not None and train_dataloader is not None
        self.events.append("begin")

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append("step")

    def on_substep_end(self, args, state, control, **kwargs):
        self.events.append("substep")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.events.append("optimizer")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        assert metrics["eval_loss"] > 0
        self.events.append("evaluate")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


@pytest.mark.parametrize("learned", [LEARNED, PILOT, None], ids=["learned", "pilot", "fixed"])
def test_callbacks_hear_what_they_hear_of_sft_trainer(learned, build, weighted):
    """What chooses, a pilot with its steps too, is none of a callback's business."""
    notes = Notes()
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 2}
    rows, chosen = (weighted, {}) if learned is None else (None, learned)
    trainer = build(rows, {"callbacks": [notes]}, eval_strategy="epoch", **settings, **chosen)
    trainer.train()
    assert notes.events == ["begin", *["step", "substep", "optimizer"] * 2, "evaluate", "end"]
    assert all("selector/ess" in logs for logs in notes.logs if "loss" in logs)
    assert trainer.state.global_step == 2


def test_a_callback_added_later_may_stop_the_run(build):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = build()
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 2 and not torch.isnan(trainer.sample_weights()).any()


def test_compute_metrics_sees_the_labels_and_logits_of_eval_rows(build, validation_rows, tokenizer):
    seen = {}

    def accuracy(prediction):
        logits, labels = prediction.predictions, prediction.label_ids
        seen.update(logits=logits.shape, labels=labels.shape)
        kept = labels[:, 1:] != -100
        return {"accuracy": float((logits.argmax(-1)[:, :-1] == labels[:, 1:])[kept].mean())}

    trainer = build(None, {"compute_metrics": accuracy}, max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    assert seen["logits"] == (*seen["labels"], len(tokenizer)) and seen["labels"][0] == 8
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"], abs=1e-6)


def test_early_stopping_and_the_best_model(build, tmp_path):
    """A learning rate at which the eval loss goes up stops the run, and brings the first model back."""
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "learning_rate": 5.0,
        "lr_scheduler_type": "constant",
        "max_steps": 12,
    }
    trainer = build(None, {"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]}, **settings)
    trainer.train()
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = min(range(len(history)), key=history.__getitem__)
    assert len(history) == best + 3 < 12
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[best], rel=1e-5)
    # Weights are not part of the model: they stay those of the run.
    assert float(trainer.sample_weights().mean()) == pytest.approx(1, abs=1e-5)


def test_the_best_model_of_several_eval_sets(build, validation_rows):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_b_loss", "greater_is_better": False}
    trainer = build(**settings, **best)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.train()
    assert trainer.state.best_metric is not None


class Counting(DataCollatorForLanguageModeling):
    """A user's collator: TRL's, that pads on to a multiple of 32."""

    batches = 0

    def __call__(self, features):
        type(self).batches += 1
        return super().__call__(features)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
def test_a_collator_of_the_users_own(learned, build, tokenizer, weighted):
    Counting.batches = 0
    collator = Counting(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=32)
    rows = None if learned else weighted
    own = build(rows, {"data_collator": collator})
    own.train()
    assert Counting.batches >= 6
    plain = build(rows)
    plain.train()
    assert losses(own) == pytest.approx(losses(plain), rel=1e-5)


def test_a_collator_that_merges_rows_is_refused(build, tokenizer):
    class Merging(DataCollatorForLanguageModeling):
        def __call__(self, features):
            return super().__call__(features[:1])

    trainer = build(None, {"data_collator": Merging(pad_token_id=tokenizer.pad_token_id)})
    with pytest.raises(ValueError, match=r"Merging turned 40 rows into 1"):
        trainer.train()


def test_optimizers_of_the_users_own(build, weighted):
    def make(rows):
        trainer = build(rows)
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return trainer, optimizer

    for rows in (None, weighted):
        trainer, optimizer = make(rows)
        before = parameters(trainer)
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
        assert any(not torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))


def test_fixed_weights_under_accumulation(build, weighted, tiny_model, tokenizer):
    """Eight rows at once, or twice four, or eight times one: the same weighted loss, the same model."""
    outcomes = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = build(weighted, max_steps=3, **sizes)
        trainer.train()
        outcomes.append((losses(trainer), parameters(trainer)))
    for found, values in outcomes[1:]:
        assert found == pytest.approx(outcomes[0][0], rel=1e-5)
        for a, b in zip(values, outcomes[0][1], strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_fixed_weights_take_the_step_computed_by_hand(build, train_rows, tiny_model, tokenizer):
    """One step of gradient descent: on the sum of w_i times the losses of row i's tokens, over that of the weights."""
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 0.1, 0.4, 1.0])
    rows = train_rows.select(range(8)).add_column("data_weight", weights.tolist())
    descent = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = build(rows, max_steps=1, **descent)
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    with torch.no_grad():
        for value, start in zip([p for p in trainer.model.parameters() if p.requires_grad], before, strict=True):
            value.copy_(start)
    total = tokens = 0
    for row, weight in zip(trainer.train_dataset, weights / weights.mean(), strict=True):
        device = trainer.model.device
        ids, labels = torch.tensor([row["input_ids"]]).to(device), torch.tensor([row["labels"]])[:, 1:].to(device)
        logits = trainer.model(input_ids=ids).logits[:, :-1].float()
        losses_of_tokens = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        total = total + weight * losses_of_tokens.sum()
        tokens = tokens + weight * (labels != -100).sum()
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total / tokens, trainable)
    assert losses(trainer)[0] == pytest.approx(float((total / tokens).detach()), rel=1e-5)
    for start, gradient, end in zip(before, gradients, after, strict=True):
        torch.testing.assert_close(end, start - 0.5 * gradient, atol=1e-6, rtol=1e-4)


def test_a_weight_of_two_is_a_row_twice(build, train_rows, tiny_model, tokenizer, tmp_path):
    """Plain SFT on the doubled rows takes the same step, of the same loss."""
    rows = train_rows.select(range(4))
    weighted = rows.add_column("data_weight", [2.0, 1.0, 1.0, 2.0])
    descent = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    ours = build(weighted, max_steps=1, per_device_train_batch_size=4, **descent)
    start = parameters(ours)
    ours.train()
    doubled = rows.select([0, 0, 1, 2, 3, 3])
    plain = SFTTrainer(
        tiny_model(),
        SFTConfig(**(base_arguments(tmp_path) | descent | {"max_steps": 1, "per_device_train_batch_size": 6})),
        train_dataset=doubled,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    plain.train()
    moves = [
        torch.cat([(b - a).flatten() for a, b in zip(start, parameters(trainer), strict=True)])
        for trainer in (ours, plain)
    ]
    torch.testing.assert_close(moves[0], moves[1], atol=1e-6, rtol=1e-5)
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)
