"""Settings and data that cannot work are refused, with the reason."""

import pytest
from datasets import Dataset

from trl_bilevel import SelfRefineTrainer


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generations": 1}, "implicit_weight_scope='round'"),
        ({"implicit_weight_scope": "batch"}, "implicit_weight_scope"),
        ({"implicit_weight_scope": "round", "use_vllm": True, "vllm_mode": "server"}, "once per group"),
        (
            {
                "num_generations": 1,
                "implicit_weight_scope": "round",
                "per_device_train_batch_size": 1,
                "steps_per_round": 1,
                "gradient_accumulation_steps": 1,
            },
            "compares nothing",
        ),
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 20}, "top_k=20"),
        ({"top_k": None}, "top_k=None"),
        ({"generation_kwargs": {"do_sample": False}}, "'do_sample'"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "'no_repeat_ngram_size'"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"response_estimator": "value_function", "validation_loss_weight": 0.0}, "no say in the scores"),
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
        ({"response_estimator": "loss"}, "response_estimator"),
        ({"fp16": True, "use_cpu": False}, "fp16|half-precision"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
    ],
)
def test_bad_settings_are_refused(refine_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        refine_config(**overrides)


def test_bad_data_is_refused(build, rows, train_rows, trusted):
    cases = [
        ({"validation": trusted.select(range(12))}, "too few to split"),
        ({"train": Dataset.from_list([{"text": "a"}] * 20)}, "has no column 'prompt'"),
        ({"train": train_rows.add_column("data_weight", [-1.0] * 40)}, "`data_weight`"),
        ({"prompt_dataset": train_rows.select_columns(["prompt"])}, "lowest_weight"),
        ({"selection_dataset": trusted.select(range(3))}, "select the model"),
        ({"train": train_rows.add_column("chat_template_kwargs", [{"style": "x"}] * 40)}, "chat_template_kwargs"),
    ]
    for overrides, message in cases:
        with pytest.raises(ValueError, match=message):
            build(**overrides)
    for overrides, argument in (
        ({"train": rows}, "train_dataset"),
        ({"validation": rows[40:80]}, "validation_dataset"),
        ({"validation": rows[40:80], "selection_dataset": trusted}, "validation_dataset"),
        ({"selection_dataset": rows[40:80]}, "selection_dataset"),
    ):
        with pytest.raises(TypeError, match=f"`{argument}`.* must be"):
            build(**overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"selection_dataset": range(40, 52)}, "should select the model are also among those that drive the scores"),
        ({"selection_dataset": range(0, 12)}, "should select the model are also among those that are trained on"),
        ({"eval_dataset": range(40, 80)}, "should only report are also among those that select the model"),
        ({"eval_dataset": range(0, 4)}, "should only report are also among those that are trained on"),
    ],
)
def test_rows_on_two_sides_are_warned_of(build, rows, overrides, message):
    with pytest.warns(UserWarning, match=message):
        build(**{name: Dataset.from_list([rows[i] for i in chosen]) for name, chosen in overrides.items()})


def test_vllm_and_templates_that_are_missing(build, refine_config, tiny_model, train_rows, trusted, tokenizer):
    with pytest.raises(ImportError, match="vLLM is not installed"):
        build(use_vllm=True)
    bare = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    chats = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 40
    )
    with pytest.raises(ValueError, match="chat template"):
        SelfRefineTrainer(tiny_model(), refine_config(), chats, trusted, processing_class=bare)


def test_reward_functions_are_not_taken(refine_config, tiny_model, train_rows, trusted, tokenizer):
    with pytest.raises((ValueError, TypeError), match="reward_funcs"):
        SelfRefineTrainer(
            tiny_model(),
            refine_config(),
            train_rows,
            trusted,
            processing_class=tokenizer,
            reward_funcs=lambda **_: [1],
        )
