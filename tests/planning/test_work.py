"""FLOPs against those that PyTorch counts."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, PrinterCallback

from benchmarks import cost
from benchmarks.memory import adapters, make_config, make_model
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.planning import work
from trl_bilevel.planning.shapes import RunShape, model_shape, run_shape
from trl_bilevel.weights.language_model import LanguageModel, checkpointed, left_as_it_was
from trl_bilevel.weights.pilot import Pilot, PilotRecipe

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
CHECKPOINTING = {"lora_r": 8, "gradient_checkpointing": True}
PILOT = {"weight_estimator": "value_function", "pilot_steps": 2}
BOTH = PILOT | {"weight_estimator": "both"}
RUNS = {
    "LoRA, checkpointing": CHECKPOINTING,
    "full": {},
    "value function": CHECKPOINTING | PILOT,
    "value function, full": PILOT,
    "both, trusted rows in every step": CHECKPOINTING | BOTH | {"validation_loss_weight": 0.5},
    "probe": {"weight_estimator": "probe", "lora_r": 8},
    "probe, full": {"weight_estimator": "probe"},
    "fast": {"weight_estimator": "probe", "selector_preset": "fast", "lora_r": 8},
    "published update": CHECKPOINTING | {"weight_estimator": "value_function", "selector_preset": "sparse_centred"},
}


def _product(own, left, right, **kwargs):
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("name", RUNS)
def test_whole_runs_with_everything_counted(name, small_config, tokenizer):
    """Choosing, training, and the trusted rows' losses for the report."""
    setting = RUNS[name] | {"attention": "eager", "max_steps": 2, "per_device_train_batch_size": 4}
    tokens, rows, trusted, args = 64, 24, 16, make_config(setting)
    trainer = BilevelSFTTrainer(
        make_model(setting, small_config),
        args,
        train_dataset=cost.make_rows(rows, 0, tokens),
        validation_dataset=cost.make_rows(trusted, 1, tokens),
        processing_class=tokenizer,
        peft_config=adapters(setting),
    )
    trainer.remove_callback(PrinterCallback)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _product}) as counter:
        trainer.train()
    model = model_shape(small_config, peft_config=adapters(setting))
    sizes = {"tokens": tokens, "scored_tokens": tokens / 2, "training_rows": rows, "validation_rows": trusted}
    run = run_shape(args, device="cpu", attention="eager", **sizes)
    assert work.estimate_work(model, run)["total"] == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("own", [None, LORA], ids=["full", "LoRA"])
def test_a_row_of_the_pilot_run_with_everything_counted(own, checkpointing, small_config):
    small_config.update({"num_hidden_layers": 6, "_attn_implementation": "eager"})
    shape = model_shape(small_config, peft_config=own)
    model = LlamaForCausalLM(small_config)
    reader = LanguageModel(model if own is None else get_peft_model(model, own))
    pilot = Pilot(reader, PilotRecipe(1, 1e-3, 0))
    ids, rows = torch.randint(3, 1000, (2, 64)), 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :20] = -100

    def counted(train):
        layers = reader.decoder()[1] if checkpointing else []
        with (
            left_as_it_was(reader.model),
            checkpointed(layers),
            pilot.mixture.added(),
            FlopCounterMode(display=False) as counter,
        ):
            loss = reader.row_losses(batch).sums.sum()
            if train:
                loss.backward()
        return counter.get_total_flops() / rows

    run = RunShape(rows=2, tokens=64, scored_tokens=44, attention="eager", checkpointing=checkpointing)
    passed, trained = work.pilot_row(shape, run, 64)
    with torch.no_grad():
        assert passed == pytest.approx(counted(train=False), rel=0.03)
    assert trained == pytest.approx(counted(train=True), rel=0.03)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"training_rows": None}, 24 * 24),
        ({"training_rows": 100}, 12 * 24),
        ({"training_rows": 5}, 8 * 24),
        ({"training_rows": 10**6}, 24 * 24),
        ({"pilot_steps": 40}, 40 * 24),
        ({"estimator": "both", "pilot_steps": 4}, 4 * 24),
    ],
)
def test_rows_of_the_pilot_run(settings, rows):
    assert work.pilot_rows(RunShape(rows=1, tokens=8, **({"estimator": "value_function"} | settings))) == rows


def test_the_published_update_with_a_tracker_trains_on_every_batch_twice(small_config):
    model, run = model_shape(small_config), RunShape(rows=4, tokens=64, joined=1, steps=3)
    uniform = work.estimate_work(model, run)
    assert uniform["training"] == pytest.approx(1.25 * uniform["plain"])
    assert uniform["total"] == uniform["training"] + uniform["following"]
    moving = work.estimate_work(model, replace(run, estimator="sparse_centred"))
    assert moving["training"] == pytest.approx(2.25 * moving["plain"])
    assert moving["total"] == moving["training"] + moving["following"]
    assert work.estimate_work(model, replace(run, estimator="seal")) == uniform


def test_length_of_the_run_may_be_unknown(small_config, tmp_path):
    args = BilevelSFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    found = work.estimate_work(model_shape(small_config), run_shape(args, tokens=64))
    assert found["step"] > 0 and found["training"] is None and found["total"] is None
