from dataclasses import replace

import pytest
from peft import LoraConfig

from trl_bilevel import BilevelSFTConfig
from trl_bilevel.planning.memory import estimate_memory, savings, way_to_fit
from trl_bilevel.planning.shapes import RunShape, find_config, model_shape, run_shape

LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def full():
    return model_shape(find_config("SmolLM2-1.7B")[0])


@pytest.fixture(scope="module")
def adapted():
    return model_shape(find_config("SmolLM2-1.7B")[0], peft_config=LORA)


def test_savings_save_what_they_say_and_the_best_comes_first(adapted):
    run = RunShape(rows=8, tokens=1024, checkpointing=False, attention="eager", estimator="value_function")
    found = savings(adapted, run)
    saved = [told["saves_bytes"] for told, *_ in found]
    assert saved == sorted(saved, reverse=True)
    before = estimate_memory(adapted, run).total_bytes
    for told, *after in found:
        assert before - estimate_memory(*after).total_bytes == told["saves_bytes"] > 0
    names = {told["name"] for told, *_ in found}
    assert {"gradient checkpointing", "smaller micro-batch", "shorter rows", "sdpa attention"} <= names


def one(found, name):
    return next(saving for saving in found if saving[0]["name"] == name)


def test_a_micro_batch_is_made_smaller_without_changing_the_batch(adapted):
    told, *_ = one(savings(adapted, RunShape(rows=6, tokens=512, accumulation=2)), "smaller micro-batch")
    assert told["settings"] == {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}


def test_way_to_fit(full, adapted):
    run = RunShape(rows=8, tokens=2048, estimator="value_function")
    assert way_to_fit(full, run, 10**6, adapted) == []
    way = way_to_fit(full, run, 12, adapted)
    assert way and estimate_memory(*way[-1][1:]).fits(12)
    assert not any(estimate_memory(*saving[1:]).fits(12) for saving in way[:-1])
    assert way_to_fit(full, run, 0.5, adapted) is None


def test_choosing_weights_costs_full_fine_tuning_no_more_memory_than_adapters(full, adapted):
    run = RunShape(rows=1, tokens=256)
    for model in (full, adapted):
        chosen = estimate_memory(model, replace(run, estimator="value_function"))
        (pilot,) = {parts.get("pilot run") for parts in chosen.moments.values()} - {None}
        # Two sets of adapters of rank 8 on a third of the layers, 16 bytes a parameter.
        assert pilot == 2 * 16 * 8 / 16 * adapted.trainable / 3
    # Without the optimizer's states of all parameters, the pilot run needs less than training.
    plan = estimate_memory(full, replace(run, estimator="value_function"))
    assert plan.peak.startswith("training")
    assert plan.total_bytes == estimate_memory(full, run).total_bytes
    # What the published update trains beside the model is a second set of all parameters.
    moving = estimate_memory(full, replace(run, estimator="sparse_centred"))
    assert moving.tensor_bytes - plan.tensor_bytes == 3 * full.trainable_bytes


@pytest.fixture
def make_args(tmp_path):
    return lambda **given: BilevelSFTConfig(str(tmp_path), use_cpu=True, **({"bf16": False} | given))


def test_run_shape_reads_the_config(make_args):
    args = make_args(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_length=300,
        validation_loss_weight=0.5,
        bf16=True,
        gradient_checkpointing=False,
        optim="adamw_bnb_8bit",
        weight_estimator="both",
        pilot_steps=9,
        max_steps=7,
    )
    run = run_shape(args, processes=2)
    assert (run.rows, run.tokens, run.rows_per_step, run.steps) == (4, 300, 24, 7)
    assert run.autocast and not run.checkpointing and run.optimizer == "adamw_bnb_8bit" and run.padded
    # A quarter of 24 rows.
    assert (run.joined, run.estimator, run.pilot_steps, run.matches) == (6, "both", 9, True)
    assert run.pilots and run.probes and run.training_rows is None


@pytest.mark.parametrize(
    ("preset", "estimator", "probes", "pilots", "matches"),
    [
        ("balanced", "probe", True, False, True),
        ("reliable", "both", True, True, True),
        ("fast", "probe", True, False, False),
        ("paper", "paper", False, False, True),
    ],
)
def test_presets_say_how_rows_are_chosen(preset, estimator, probes, pilots, matches, make_args):
    run = run_shape(make_args(selector_preset=preset))
    assert (run.estimator, run.probes, run.pilots, run.matches) == (estimator, probes, pilots, matches)


def test_packed_rows_need_no_mask(make_args):
    assert not run_shape(make_args(packing=True)).padded


def test_rows_of_unknown_length(make_args):
    with pytest.raises(ValueError, match="`max_length` is None"):
        run_shape(make_args(max_length=None))
    assert run_shape(make_args(max_length=None), tokens=77).tokens == 77
    assert run_shape(make_args(max_length=50), tokens=77).tokens == 50
