"""`weight_estimator="alignment"` in the trainer: exact scores, whatever the batch, and nothing else changed."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl_bilevel.core.alignment import unit_length
from trl_bilevel.trainer.estimator import make_estimator
from trl_bilevel.trainer.host import TrainerHost
from trl_bilevel.trainer.pilot import make_pilot

from tests.conftest import parameters
from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.data.identity import SAMPLE_ID
from trl_bilevel.trainer.record import RecordCallback

ONLINE = {
    "weight_estimator": "alignment",
    "selector_update": "sparse_centred",
    "selector_warmup_steps": 0,
    "learning_rate": 0.0,
    "lr_scheduler_type": "constant",
}


# LoRA with more than matrices of one rank.
ADAPTERS = {
    "lora_biased": {"lora_bias": True},
    "lora_patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2, "up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.fixture
def build(tiny_model, config, train_rows, validation_rows, tokenizer, tmp_path):
    def make(kind="lora", train=train_rows, model=None, fresh=False, **overrides):
        # A fresh adapter has `lora_B = 0`, and so no gradient of `lora_A`.
        adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=fresh, **ADAPTERS.get(kind, {}))
        extra = {} if kind == "full" else {"peft_config": adapter}
        if kind.startswith("nf4"):
            pytest.importorskip("bitsandbytes")
            wide = tiny_model(hidden_size=64, intermediate_size=128)
            wide.save_pretrained(tmp_path / "model")
            tokenizer.save_pretrained(tmp_path / "model")
            dtype = torch.float32 if kind == "nf4" else torch.bfloat16
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            model = str(tmp_path / "model")
        torch.manual_seed(0)
        trainer = BilevelSFTTrainer(
            model or tiny_model(),
            config(**(ONLINE | overrides)),
            train_dataset=train,
            validation_dataset=validation_rows,
            processing_class=tokenizer,
            **extra,
        )
        if kind == "nf4":
            # TRL has adapters of 4-bit models in bf16: in fp32 the agreement can be shown to more digits.
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        return trainer

    return make


def watched(trainer):
    """Train; returns the scores that the selector was given, by row number."""
    scores = {}
    update = trainer.selection.update

    def record(ids, values):
        scores.update(zip(ids.tolist(), values.tolist(), strict=True))
        update(ids, values)

    trainer.selection.update = record
    trainer.train()
    return scores


def autograd_scores(trainer, rows, normalise=False):
    """`<grad of the row's mean loss, U>`, one unpadded row and one `autograd.grad` at a time."""
    host, taps = TrainerHost(trainer), trainer.estimator.taps
    trainer.model.train()
    out = []
    for row in rows:
        position = trainer.train_dataset[SAMPLE_ID].index(row)
        found = host.row_losses(trainer.collate_rows([position]))
        mean = (found.sums / found.counts).sum()
        if trainer.args.gradient_checkpointing:
            # Reentrant checkpointing knows `backward` only.
            mean.backward()
            grads = [p.grad for p in taps.parameters]
            trainer.model.zero_grad()
        else:
            grads = torch.autograd.grad(mean, taps.parameters)
        score = sum((g.double() * u.double()).sum() for g, u in zip(grads, taps.direction, strict=True))
        if normalise:
            score = score / sum(g.double().square().sum() for g in grads).sqrt()
        out.append(float(score))
    return torch.tensor(out)


def error(trainer, scores, **how):
    expected = autograd_scores(trainer, list(scores), **how)
    return float((torch.tensor(list(scores.values())) - expected).abs().max() / expected.abs().max())


SETTINGS = {
    "lora": {},
    "lora_accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "lora_single_rows": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "lora_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "lora_non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "lora_gradient": {"alignment_direction": "gradient", "validation_loss_weight": 0.0},
    "lora_displacement": {"alignment_direction": "displacement", "learning_rate": 1e-9},
    "full": {"kind": "full"},
    "full_accumulated": {"kind": "full", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "full_reentrant": {
        "kind": "full",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "full_non_reentrant": {
        "kind": "full",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "nf4": {"kind": "nf4"},
    "nf4_accumulated": {"kind": "nf4", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    **{
        f"nf4_{'reentrant' if reentrant else 'non_reentrant'}": {
            "kind": "nf4",
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        for reentrant in (True, False)
    },
    "lora_biased": {"kind": "lora_biased"},
    "lora_patterns": {"kind": "lora_patterns"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_inner_products_of_gradients(name, build):
    """With unequal weights, and validation rows in the same batches."""
    trainer = build(**({"max_steps": 1} | SETTINGS[name]))
    trainer.selection.set_weights(torch.linspace(0.1, 3.0, 40))
    scores = watched(trainer)
    assert len(scores) == 8
    found = error(trainer, scores)
    assert found < 1e-4


@pytest.mark.parametrize("kind", ["lora", "full", "nf4_bf16"])
def test_bf16_scores_stay_close(kind, build):
    """Activations and their gradients have 8 bits, and padding a batch changes how products of them are summed.

    Autograd also rounds each weight's gradient to bf16, which the taps do not.
    """
    trainer = build(kind, bf16=True, max_steps=1)
    scores = watched(trainer)
    found = error(trainer, scores)
    assert found < 3e-2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_cosine_scores(kind, build):
    trainer = build(kind, alignment_normalise=True, max_steps=1)
    scores = watched(trainer)
    assert max(map(abs, scores.values())) <= 1
    found = error(trainer, scores, normalise=True)
    assert found < 1e-4


def test_the_direction_is_the_validation_gradient(build):
    trainer = build(max_steps=1, alignment_direction="gradient")
    trainer.train()
    host, taps = TrainerHost(trainer), trainer.estimator.taps
    loss = sum(
        (weights.to(trainer.model.device) * host.row_losses(batch).sums).sum()
        for batch, weights in host.validation_batches(0)
    )
    expected = unit_length(torch.autograd.grad(loss, taps.parameters))
    for found, gradient in zip(taps.direction, expected, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-5)


def test_displacement_points_along_the_gradient(build):
    """One small AdamW step from the start moves each parameter against the sign of its gradient."""
    settings = {"max_steps": 1, "learning_rate": 1e-3, "lookahead_steps": 1}
    plain = build(alignment_direction="gradient", **settings)
    moved = build(alignment_direction="displacement", **settings)
    for trainer in (plain, moved):
        trainer.create_optimizer_and_scheduler(1)
        trainer.start_selection()
        trainer.model.train()
        trainer.estimator.begin_step([])
    for gradient, step in zip(plain.estimator.taps.direction, moved.estimator.taps.direction, strict=True):
        large = gradient.abs() > 1e-3
        assert bool((gradient.sign() == step.sign())[large].all())


def test_the_direction_is_preconditioned_and_averaged(build):
    trainer = build(max_steps=5, estimator_refresh_steps=2, learning_rate=1e-2, alignment_averaging=0.5)
    trainer.start_selection()
    estimator = trainer.estimator
    gradients, moments = [], []
    gradient, preconditioned = estimator._gradient, estimator._preconditioned

    def watch_gradient(draws):
        gradients.append(gradient(draws))
        return gradients[-1]

    def watch_moments(found):
        known = estimator.host.second_moments(estimator.taps.parameters)
        known = [m and m._replace(value=m.value.clone(), step=m.step.clone()) for m in known]
        moments.append(([g.clone() for g in found], known))
        return preconditioned(found)

    estimator._gradient, estimator._preconditioned = watch_gradient, watch_moments
    trainer.train()
    assert len(gradients) == 3 and estimator.fresh_at == 4
    assert all(m is None for m in moments[0][1]) and all(m is not None for m in moments[2][1])
    mean, last = moments[2]
    for i, found in enumerate(mean):
        expected = (gradients[0][i] + 2 * gradients[1][i] + 4 * gradients[2][i]) / 7
        torch.testing.assert_close(found, expected)
    scaled = []
    for g, m in zip(mean, last, strict=True):
        assert (float(m.step), m.beta, m.eps) == (4, 0.999, 1e-8)
        value = (m.beta * m.value + (1 - m.beta) * g**2) / (1 - m.beta**5)
        scaled.append(g / (value.sqrt() + m.eps))
    for found, expected in zip(estimator.taps.direction, unit_length(scaled), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_further_forward_of_training_rows(build):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "validation_batch_size": 8}
    trainer = build(max_steps=3, validation_loss_weight=0.5, validation_every=1, **sizes)
    # It looks at validation rows before and after training, not in the steps that are counted here.
    trainer.remove_callback(RecordCallback)
    calls = []
    trainer.model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    # The only refresh looks at two micro-batches of validation rows; then each micro-batch is seen once.
    assert calls == [4, 4] + [8] * 6


def test_the_model_trains_as_without_taps(build):
    settings = {"learning_rate": 1e-2, "selector_learning_rate": 0.0, "max_steps": 4}
    with_taps, without = build(**settings), build(**settings | {"weight_estimator": "lookahead"})
    with_taps.train()
    without.train()
    assert all(torch.equal(a, b) for a, b in zip(parameters(with_taps), parameters(without), strict=True))
    assert not any(layer._forward_hooks for layer in with_taps.model.modules() if "lora" in type(layer).__name__)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_response_scores_leave_the_gradients_alone(checkpointing, mode, build):
    trainer = build(max_steps=1, gradient_checkpointing=checkpointing)
    scores = watched(trainer)
    trainer.model.train(mode == "train")
    own = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in own)
    own[0].grad = marker = torch.ones_like(own[0])
    batch = trainer.collate_rows([trainer.train_dataset[SAMPLE_ID].index(row) for row in scores])
    with torch.no_grad():
        found = trainer.estimator.response_scores(batch)
        both = trainer.estimator.row_scores(batch)
    torch.testing.assert_close(found.cpu(), torch.tensor(list(scores.values())), rtol=1e-3, atol=1e-6)
    assert both.shape == (8, 2) and torch.equal(both[:, 0], found)
    assert bool(((both[:, 1] > 0) & (both[:, 1] < 1)).all())
    assert own[0].grad is marker and bool((marker == 1).all())
    assert all(p.grad is None for p in own[1:])
    assert all(layer.training == (mode == "train") for layer in trainer.model.modules())


@pytest.mark.parametrize("name", ["lookahead", "value_function"])
def test_response_scores_of_the_others_are_differences_of_losses(name, build):
    trainer = build(weight_estimator=name, learning_rate=1e-2, max_steps=2)
    trainer.train()
    batch = trainer.collate_rows([0, 1, 2])
    with torch.no_grad():
        reference, model = trainer.estimator.loss_pair(batch)
        found = trainer.estimator.response_scores(batch)
    torch.testing.assert_close(found, reference.means() - model.means())


def test_rows_of_weight_zero_keep_their_logit(build):
    trainer = build(max_steps=1, filter_rate=0.5)
    trainer.selection.set_weights(torch.linspace(0.1, 3.0, 40))
    before = trainer.selection.state.logits.clone()
    gated = (trainer.sample_weights() == 0).nonzero().flatten().tolist()
    scores = watched(trainer)
    assert 0 < len(scores) < 8 and not set(scores) & set(gated)
    assert error(trainer, scores) < 1e-4
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[list(scores)] = False
    assert torch.equal(trainer.selection.state.logits[untouched], before[untouched])


@pytest.mark.parametrize("direction", ["preconditioned", "gradient", "displacement"])
def test_pilot_scores_good_rows_above_bad(direction, build, rows):
    """Answers of one wrong sentence, against validation rows that have right ones."""
    data = [dict(row, completion="I do not know, sorry.") if i % 2 else row for i, row in enumerate(rows[:40])]
    trainer = build(
        train=Dataset.from_list(data),
        fresh=True,
        selector_update="calibrated",
        learning_rate=1e-2,
        pilot_steps=12,
        pilot_learning_rate=1e-2,
        alignment_direction=direction,
    )
    scores, _, _ = make_pilot(trainer).run()
    good, bad = scores[::2, 0], scores[1::2, 0]
    assert float((good.unsqueeze(1) > bad).float().mean()) > 0.75
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_state_comes_back(build):
    trainer = build(max_steps=3, estimator_refresh_steps=1, learning_rate=1e-2)
    trainer.train()
    again = make_estimator(trainer.args, TrainerHost(trainer))
    again.load_tensors(trainer.estimator.tensors())
    assert again.fresh_at == 2 and again.refreshes == 3
    for name, value in trainer.estimator.tensors().items():
        assert torch.equal(again.tensors()[name], value), name
    for own, other in (
        (trainer.estimator.average, again.average),
        (trainer.estimator.taps.direction, again.taps.direction),
    ):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    empty = make_estimator(trainer.args, TrainerHost(trainer))
    empty.load_tensors(make_estimator(trainer.args, TrainerHost(trainer)).tensors())
    assert empty.taps is not None and empty.fresh_at == -1


def test_a_model_without_a_layer_to_read_is_refused(build, tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "embed" in name)
    with pytest.raises(ValueError, match=r"none of the trainable parameters.*embed_tokens"):
        build("full", model=model)


def test_compiled_models_are_refused(build):
    with pytest.raises(ValueError, match="does not support `torch_compile=True`"):
        build(torch_compile=True)
