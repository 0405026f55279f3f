"""Configuration of [`SelfRefineTrainer`]."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import trl
from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from ..data.questions import STRATEGIES
from ..weights import settings
from ..weights.settings import PilotSettings, at_least, in_range, one_of, takes_old_names

# Old names: what to use instead. Whoever gives one is told.
RENAMED = settings.RENAMED | {
    "implicit_weight_scope": "nothing: the responses to one question are compared with each other",
    "question_weighting": "nothing: responses weigh as their question does",
    "response_estimator": "nothing: responses are scored by a look-ahead",
    "lookahead_steps": "nothing: 4 steps, as measured",
    "validation_batch_size": "nothing: as many trusted rows as offline rows in a step",
}
# The sampled distribution must be the policy's own, or log-probabilities and ratios are those of another one.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_p": (1.0,),
    # Not None: transformers then takes its own default of 50.
    "top_k": (0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
}
# What else `generation_kwargs` may hold: settings that do not change the sampled distribution.
HARMLESS = (
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "seed",
)
# Settings of the parent that have one value here, and what another one would do.
FIXED: dict[str, tuple[Any, str]] = {
    "num_iterations": (1, "each response is trained on once"),
    "scale_rewards": ("none", "it would undo the scale of the implicit weights"),
    "multi_objective_aggregation": ("sum_then_normalize", "it would undo the scale of the implicit weights"),
    "disable_dropout": (
        True,
        "TRL samples and trains in training mode, so with dropout the responses' log-probabilities are not those of "
        "the policy that sampled them",
    ),
    "eval_strategy": ("no", "`eval_dataset` is looked at once per round, see the ledger"),
    "remove_unused_columns": (False, "it drops the questions' numbers"),
    "cast_lm_head_to_fp32": (False, "the offline rows use the same head"),
    "vllm_structured_outputs_regex": (None, "it restricts what is sampled"),
}

# What rounds rest on in TRL's GRPOTrainer: methods, and what their sources must hold.
CONTRACT = {
    "__init__": ("eos_token_ids", "mask_truncated_completions", "_buffered_inputs", "_step"),
    "_prepare_inputs": ("_generate_and_score_completions", "steps_per_generation"),
    "_generate_single_turn": (),
    "_tokenize_prompts": (),
    "_calculate_rewards": ("completion_ids",),
}


@takes_old_names(RENAMED)
@dataclass
class SelfRefineConfig(PilotSettings, GRPOConfig):
    r"""
    Configuration class for the [`SelfRefineTrainer`].

    Inherits every parameter of [`~trl.GRPOConfig`] (generation, vLLM, continuous batching, off-policy clipping) and of
    [`PilotSettings`] (`weight_estimator`, `selector_preset`, `validation_weights`, `pilot_steps`,
    `pilot_learning_rate`, which is also that of the responses' look-ahead, `calibration_sharpness`), and adds those of
    the rounds. With a column `data_weight` in `train_dataset` no weights are learned. A round generates
    `per_device_train_batch_size x processes x gradient_accumulation_steps x steps_per_round` responses, so it asks
    that number divided by `num_generations` questions.

    Parameters:
        num_rounds (`int`, *optional*, defaults to `4`):
            Rounds at most; `max_steps` follows.
        steps_per_round (`int`, *optional*, defaults to `8`):
            R, optimizer steps of a round. All responses of a round are generated at its start, each is trained on
            once.
        num_generations (`int`, *optional*, defaults to `4`):
            G, responses per question. With one response there is nothing to compare within a question, so at least 2;
            use 4 or more.
        question_strategy (`str`, *optional*, defaults to `"lowest_weight"`):
            Which questions are asked: `"lowest_weight"` (those whose offline answers weigh least), `"random"`,
            `"all"`.
        question_fraction (`float`, *optional*, defaults to `0.25`):
            Share of the rows that `"lowest_weight"` and `"random"` choose from.
        implicit_weight_temperature (`float`, *optional*, defaults to `0.1`):
            tau of the softmax over a question's responses, in nats per token.
        online_loss_weight (`float`, *optional*, defaults to `0.5`):
            Share of the responses in the training term, in [0, 1); the offline rows have the rest.
        validation_loss_weight (`float`, *optional*, defaults to `0.5`):
            lambda, the weight of the trusted rows' loss in the model's objective, in [0, 1). A step has as many
            trusted rows as offline rows.
        selection_split (`float`, *optional*, defaults to `0.3`):
            Share of each trusted set that only chooses between the candidates of a round, if no `selection_dataset`
            is given.
        patience (`int`, *optional*, defaults to `2`):
            Stop after so many rounds in a row that were rolled back.
        max_length (`int`, *optional*, defaults to `1024`):
            Length at which offline and trusted rows are cut.
    """

    num_rounds: int = field(default=4, metadata={"help": "Rounds at most; max_steps follows."})
    steps_per_round: int = field(default=8, metadata={"help": "Optimizer steps of a round."})
    num_generations: int | None = field(default=4, metadata={"help": "G, responses per question, at least 2."})
    question_strategy: str = field(
        default="lowest_weight", metadata={"help": "Which questions are asked: 'lowest_weight', 'random' or 'all'."}
    )
    question_fraction: float = field(
        default=0.25, metadata={"help": "Share of the rows that 'lowest_weight' and 'random' choose from."}
    )
    implicit_weight_temperature: float = field(
        default=0.1, metadata={"help": "tau of the softmax over a question's responses, in nats per token."}
    )
    online_loss_weight: float = field(
        default=0.5, metadata={"help": "Share of the responses in the training term, in [0, 1)."}
    )
    validation_loss_weight: float = field(
        default=0.5, metadata={"help": "lambda, weight of the trusted rows' loss in the objective, in [0, 1)."}
    )
    selection_split: float = field(
        default=0.3, metadata={"help": "Share of the trusted rows that only chooses between candidates."}
    )
    patience: int = field(default=2, metadata={"help": "Stop after so many rounds in a row that were rolled back."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Length at which offline and trusted rows are cut."}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate for AdamW."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Fixed: with dropout, responses come from another policy than the model's."}
    )
    scale_rewards: str = field(default="none", metadata={"help": "Fixed: implicit weights carry their own scale."})

    # Declared for the type checker, which cannot see TRL's.
    max_steps: int = field(default=-1, metadata={"help": "Follows from num_rounds and steps_per_round."})
    steps_per_generation: int | None = field(default=None, metadata={"help": "Follows from steps_per_round."})

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "validation_weights"]

    def __post_init__(self) -> None:
        for name in ("num_rounds", "steps_per_round", "patience"):
            at_least(name, getattr(self, name), 1)
        if self.num_generations is None or self.num_generations < 2:
            raise ValueError(
                f"`num_generations={self.num_generations}`: implicit weights compare the responses of one question, "
                "so one response carries no signal. Use at least 2, better 4."
            )
        self._set_steps()
        super().__post_init__()
        self.resolve()
        if self.published:
            raise ValueError(
                f"`selector_preset={self.selector_preset!r}`: its weights move with every step of a training of their "
                "own. Use 'balanced', 'reliable' or 'fast'; or train with `BilevelSFTTrainer` first, and give its "
                "`weighted_dataset()`."
            )
        one_of("question_strategy", self.question_strategy, STRATEGIES)
        in_range("validation_loss_weight", self.validation_loss_weight, 0.0, 1.0)
        in_range("online_loss_weight", self.online_loss_weight, 0.0, 1.0)
        if not 0 < self.selection_split < 1:
            raise ValueError(f"`selection_split` must lie between 0 and 1, got {self.selection_split}.")
        if not 0 < self.question_fraction <= 1:
            raise ValueError(f"`question_fraction` must lie in (0, 1], got {self.question_fraction}.")
        if not 0 < self.implicit_weight_temperature < float("inf"):
            raise ValueError(
                f"`implicit_weight_temperature` must be above 0 and finite, got {self.implicit_weight_temperature}."
            )
        self._check_parents_settings()
        self._check_sampling()

    def _set_steps(self) -> None:
        """Steps and generation batches that follow from the rounds."""
        steps = self.num_rounds * self.steps_per_round
        if self.max_steps not in (-1, steps):
            raise ValueError(
                f"`max_steps={self.max_steps}` contradicts `num_rounds` x `steps_per_round` = {steps}. Leave it out."
            )
        self.max_steps = steps
        generate_every = self.steps_per_round * self.gradient_accumulation_steps
        if self.generation_batch_size is not None or self.steps_per_generation not in (None, generate_every):
            raise ValueError(
                "`generation_batch_size` and `steps_per_generation` follow from `steps_per_round` (all responses of "
                "a round are generated at its start). Leave them out."
            )
        self.steps_per_generation = generate_every

    def _check_parents_settings(self) -> None:
        for name, (value, why) in FIXED.items():
            given = getattr(self, name, value)
            if given != value:
                raise ValueError(f"`{name}={getattr(given, 'value', given)!r}` is not supported: {why}. Leave it out.")
        if self.fp16:
            raise ValueError(
                "`fp16=True` is not supported: the look-ahead takes steps of its own, without loss scaling. Use bf16."
            )
        if self.push_to_hub and self.log_completions:
            raise ValueError(
                "`log_completions=True` with `push_to_hub=True` would upload the responses, which TRL writes beside "
                "the model. Leave one of them out; `_rows/responses` has all of them."
            )
        if self.push_to_hub and self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"`hub_strategy={self.hub_strategy.value!r}` would upload checkpoints, which hold the responses "
                "of their round and so text that your rows ask for. Use 'every_save' or 'end'."
            )

    def _check_sampling(self) -> None:
        given: dict[str, Any] = {name: getattr(self, name) for name in SAMPLING}
        if isinstance(self.generation_kwargs, dict):
            given |= {name: value for name, value in self.generation_kwargs.items() if name in SAMPLING}
            for name in self.generation_kwargs:
                if name not in SAMPLING and name not in HARMLESS:
                    raise ValueError(
                        f"`generation_kwargs` has {name!r}, which may change the distribution that responses are "
                        f"sampled from. Leave it out; allowed are {', '.join((*SAMPLING, *HARMLESS))}."
                    )
        for name, value in given.items():
            if value not in SAMPLING[name]:
                raise ValueError(
                    f"`{name}={value}` samples from another distribution than the model's, so the responses' "
                    f"log-probabilities would be wrong. Use {SAMPLING[name][0]!r}."
                )


def resolved(args: GRPOConfig | None, model: Any) -> SelfRefineConfig:
    """The config to use; the defaults if none is given."""
    if isinstance(args, SelfRefineConfig):
        return args
    if args is not None:
        raise TypeError(
            f"`args` must be a `SelfRefineConfig`, got `{type(args).__name__}`: rounds need settings of their own."
        )
    name = model if isinstance(model, str) else model.config._name_or_path
    return SelfRefineConfig(f"{name.split('/')[-1]}-Self-Refine")


def check_contract(trainer: type) -> None:
    """Refuse a release of TRL whose trainer (`GRPOTrainer`) lacks what rounds rest on."""
    for method, words in CONTRACT.items():
        found = getattr(trainer, method, None)
        source = "" if found is None else inspect.getsource(found)
        missing = [word for word in words if word not in source]
        if found is None or missing:
            what = f"`GRPOTrainer.{method}`" + (f" without {', '.join(map(repr, missing))}" if found else "")
            raise ImportError(f"trl {trl.__version__} lacks {what}, which rounds need. Install trl>=1.16.")


def check_generation(args: SelfRefineConfig, grpo_arguments: Mapping[str, Any], model: Any) -> None:
    """Refuse what would break the implicit weights."""
    for name in ("reward_funcs", "reward_processing_classes", "rollout_func", "tools", "environment_factory"):
        if grpo_arguments.get(name) is not None:
            raise ValueError(
                f"`{name}` is not taken: the validation set gives the reward, and the model answers alone."
            )
    if not args.use_vllm:
        return
    if not is_vllm_available():
        raise ImportError("`use_vllm=True`, but vLLM is not installed. Install it, or leave `use_vllm` out.")
    settings = (grpo_arguments.get("quantization_config"), (args.model_init_kwargs or {}).get("quantization_config"))
    loaded = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if loaded or any(setting is not None for setting in settings):
        raise ValueError(
            "`use_vllm=True` with a quantised model: merging an adapter into quantised weights for vLLM loses "
            "nearly all of it. Generate without vLLM, or without quantisation."
        )
