from dataclasses import replace

import pytest
from peft import LoraConfig

from trl_bilevel import BilevelSFTConfig
from trl_bilevel.planning.advice import knobs, way_to_fit
from trl_bilevel.planning.memory import GIB, estimate_memory
from trl_bilevel.planning.models import find_config, model_shape
from trl_bilevel.planning.settings import run_shape
from trl_bilevel.planning.shapes import RunShape

LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def full():
    return model_shape(find_config("SmolLM2-1.7B").config)


@pytest.fixture(scope="module")
def adapted():
    return model_shape(find_config("SmolLM2-1.7B").config, peft_config=LORA)


def test_knobs_save_what_they_say_and_the_best_comes_first(adapted):
    run = RunShape(rows=8, tokens=1024, checkpointing=False, attention="eager", estimator="value_function")
    found = knobs(adapted, run)
    assert [knob.saves for knob in found] == sorted((knob.saves for knob in found), reverse=True)
    before = estimate_memory(adapted, run).total_bytes
    for knob in found:
        assert before - estimate_memory(knob.model, knob.run).total_bytes == knob.saves > 0
    names = {knob.name for knob in found}
    assert {"gradient checkpointing", "smaller micro-batch", "shorter rows", "sdpa attention"} <= names


def test_a_micro_batch_is_made_smaller_without_changing_the_batch(adapted):
    found = knobs(adapted, RunShape(rows=6, tokens=512, accumulation=2))
    knob = next(knob for knob in found if knob.name == "smaller micro-batch")
    assert knob.settings == {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}


def test_half_the_rank_is_what_a_model_with_half_the_rank_has(adapted):
    other = replace(LORA, r=8)
    real = model_shape(find_config("SmolLM2-1.7B").config, peft_config=other)
    big = model_shape(find_config("SmolLM2-1.7B").config, peft_config=replace(LORA, r=256))
    run = RunShape(rows=1, tokens=256)
    assert next(k for k in knobs(big, run) if k.name == "smaller rank").settings == {"lora_r": 128}
    from trl_bilevel.planning.advice import _half_rank

    assert _half_rank(adapted) == real


def test_way_to_fit(full, adapted):
    run = RunShape(rows=8, tokens=2048, estimator="value_function")
    assert way_to_fit(full, run, 10**6, adapted) == []
    way = way_to_fit(full, run, 12, adapted)
    assert way and estimate_memory(way[-1].model, way[-1].run).fits(12)
    assert not any(estimate_memory(knob.model, knob.run).fits(12) for knob in way[:-1])
    assert way_to_fit(full, run, 0.5, adapted) is None


def test_full_fine_tuning_of_a_small_model_pays_for_its_pilot(full):
    run = RunShape(rows=1, tokens=256)
    plain = estimate_memory(full, run).total_bytes
    selecting = estimate_memory(full, replace(run, estimator="value_function"))
    # Six times the trainable parameters on top of the model, in place of its two AdamW states.
    assert selecting.total_bytes - plain > 3.9 * full.trainable_bytes
    assert selecting.peak.name.startswith("pilot run") and selecting.total_bytes > 40 * GIB


@pytest.fixture
def make_args(tmp_path):
    return lambda **given: BilevelSFTConfig(str(tmp_path), use_cpu=True, **({"bf16": False} | given))


def test_run_shape_reads_the_config(make_args):
    args = make_args(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_length=300,
        validation_loss_weight=0.5,
        validation_every=2,
        bf16=True,
        gradient_checkpointing=False,
        optim="adamw_bnb_8bit",
        weight_estimator="lookahead",
        max_steps=7,
    )
    run = run_shape(args, processes=2)
    assert (run.rows, run.tokens, run.rows_per_step, run.steps) == (4, 300, 24, 7)
    assert run.autocast and not run.checkpointing and run.optimizer == "adamw_bnb_8bit" and run.padded
    # A quarter of 24 rows over six micro-batches; the pilot takes eight.
    assert (run.joined_rows, run.joined_every, run.pilot_batch, run.pulling_batch) == (1, 2, 8, 8)
    assert run.estimator == "lookahead" and not run.online and run.estimator_every == 32


def test_packed_rows_need_no_mask(make_args):
    assert not run_shape(make_args(packing=True)).padded


def test_rows_of_unknown_length(make_args):
    with pytest.raises(ValueError, match="`max_length` is None"):
        run_shape(make_args(max_length=None))
    assert run_shape(make_args(max_length=None), tokens=77).tokens == 77
    assert run_shape(make_args(max_length=50), tokens=77).tokens == 50
