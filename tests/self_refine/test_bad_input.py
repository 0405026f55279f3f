"""Settings and data that cannot work are refused, with the reason."""

from dataclasses import fields

import pytest
from datasets import Dataset
from trl import GRPOConfig

from tests.errors_table import REFINE_DATA as DATA
from tests.errors_table import bad_input, bad_settings
from trl_bilevel import SelfRefineConfig, SelfRefineTrainer
from trl_bilevel.trainer.self_refine_config import RENAMED
from trl_bilevel.weights.settings import PilotSettings

SETTINGS = "Settings of `SelfRefineConfig`"

CONFIGS = bad_settings(
    SETTINGS,
    [
        ({"num_generations": 1}, "one response carries no signal"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "would upload checkpoints"),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "would upload checkpoints"),
        ({"push_to_hub": True, "log_completions": True}, "would upload the responses"),
        ({"selector_preset": "paper"}, "selector_preset='paper'"),
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 20}, "top_k=20"),
        ({"top_k": None}, "top_k=None"),
        ({"generation_kwargs": {"do_sample": False}}, "'do_sample'"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "'no_repeat_ngram_size'"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"generation_kwargs": {"top_k": 5}}, "top_k=5"),
        ({"max_steps": 7}, "contradicts `num_rounds`"),
        ({"steps_per_generation": 3}, "follow from `steps_per_round`"),
        ({"num_rounds": 0}, "`num_rounds` must be at least 1"),
        ({"question_strategy": "best"}, "must be one of"),
        ({"question_fraction": 0.0}, "question_fraction"),
        ({"selection_split": 1.0}, "selection_split"),
        ({"implicit_weight_temperature": 0.0}, "implicit_weight_temperature"),
        ({"scale_rewards": "group"}, "scale_rewards"),
        ({"num_iterations": 2}, "num_iterations=2"),
        ({"fp16": True, "use_cpu": False}, "fp16|half-precision"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
    ],
)


@pytest.mark.parametrize(("overrides", "message"), CONFIGS)
def test_bad_settings_are_refused(refused, refine_config, overrides, message):
    with refused(message):
        refine_config(**overrides)


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_old_names_tell_their_successor(refine_config, name):
    with pytest.raises(TypeError, match=f"`{name}` is gone. (Use|Leave it out:) "):
        refine_config(**{name: 1})


def test_settings_are_few_and_shared_ones_are_declared_once():
    own = {field.name for field in fields(SelfRefineConfig)} - {field.name for field in fields(GRPOConfig)}
    assert len(own) <= 18
    assert {field.name for field in fields(PilotSettings)} < own
    assert not {field.name for field in fields(PilotSettings)} & set(vars(SelfRefineConfig)["__annotations__"])


def with_column(name, value):
    return lambda rows: rows.add_column(name, [value] * len(rows))


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        bad_input(DATA, "12 validation rows", "validation", lambda rows: rows.select(range(12)), "too few to split"),
        bad_input(
            DATA,
            "training rows of text alone",
            "train",
            lambda rows: Dataset.from_list([{"text": "a"}] * 20),
            "has no column 'prompt'",
        ),
        bad_input(
            DATA, "training rows with `data_weight=-1.0`", "train", with_column("data_weight", -1.0), "`data_weight`"
        ),
        bad_input(
            DATA,
            "`prompt_dataset`, with `question_strategy='lowest_weight'`",
            "prompt_dataset",
            lambda rows: rows.select_columns(["prompt"]),
            "lowest_weight",
        ),
        bad_input(
            DATA,
            "3 rows as `selection_dataset`",
            "selection_dataset",
            lambda rows: rows.select(range(3)),
            "select the",
        ),
        bad_input(
            DATA,
            "training rows with a column `chat_template_kwargs`",
            "train",
            with_column("chat_template_kwargs", {"style": "x"}),
            "chat_template_kwargs",
        ),
    ],
)
def test_bad_data_is_refused(refused, build, train_rows, trusted, argument, change, message):
    rows = trusted if argument in ("validation", "selection_dataset") else train_rows
    with refused(message):
        build(**{argument: change(rows)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad_input(DATA, "a list as `train_dataset`", {"train": "list"}, "`train_dataset`.* must be"),
        bad_input(DATA, "a list as `validation_dataset`", {"validation": "list"}, "`validation_dataset`.* must be"),
        bad_input(
            DATA,
            "a list as `validation_dataset`, with a `selection_dataset`",
            {"validation": "list", "selection_dataset": "trusted"},
            "`validation_dataset`.* must be",
        ),
        bad_input(
            DATA, "a list as `selection_dataset`", {"selection_dataset": "list"}, "`selection_dataset`.* must be"
        ),
    ],
)
def test_lists_are_refused(refused, build, rows, trusted, arguments, message):
    kinds = {"list": rows[40:80], "trusted": trusted}
    with refused(message, TypeError):
        build(**{name: kinds[kind] for name, kind in arguments.items()})


SELECTING, REPORTING = (
    "should select the model are also among those that",
    "should only report are also among those that",
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        bad_input(
            DATA,
            "`selection_dataset` shares rows with `validation_dataset`",
            {"selection_dataset": range(40, 52)},
            f"{SELECTING} drive the scores",
        ),
        bad_input(
            DATA,
            "`selection_dataset` shares rows with `train_dataset`",
            {"selection_dataset": range(0, 12)},
            f"{SELECTING} are trained on",
        ),
        bad_input(
            DATA,
            "`eval_dataset` shares rows with `validation_dataset`",
            {"eval_dataset": range(40, 80)},
            f"{REPORTING} select the model",
        ),
        bad_input(
            DATA,
            "`eval_dataset` shares rows with `train_dataset`",
            {"eval_dataset": range(0, 4)},
            f"{REPORTING} are trained on",
        ),
    ],
)
def test_rows_on_two_sides_are_warned_of(refused, build, rows, overrides, message):
    with refused(message, UserWarning):
        build(**{name: Dataset.from_list([rows[i] for i in chosen]) for name, chosen in overrides.items()})


@pytest.mark.bad_input(SETTINGS, "`use_vllm=True` without vLLM")
def test_vllm_that_is_missing(refused, build):
    with refused("vLLM is not installed", ImportError):
        build(use_vllm=True)


@pytest.mark.bad_input(DATA, "conversations, and a tokenizer without a chat template")
def test_a_template_that_is_missing(refused, refine_config, tiny_model, trusted, tokenizer):
    bare = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    chats = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 40
    )
    with refused("chat template"):
        SelfRefineTrainer(tiny_model(), refine_config(), chats, trusted, processing_class=bare)


@pytest.mark.bad_input(SETTINGS, "`reward_funcs`")
def test_reward_functions_are_not_taken(refused, refine_config, tiny_model, train_rows, trusted, tokenizer):
    with refused("reward_funcs", (ValueError, TypeError)):
        SelfRefineTrainer(
            tiny_model(),
            refine_config(),
            train_rows,
            trusted,
            processing_class=tokenizer,
            reward_funcs=lambda **_: [1],
        )
