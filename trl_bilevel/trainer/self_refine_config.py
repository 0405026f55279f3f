"""Configuration of [`SelfRefineTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..data.questions import STRATEGIES
from .bilevel_sft_config import _in_range, _one_of

RESPONSE_ESTIMATORS = ("lookahead", "alignment", "value_function")
SCOPES = ("question", "round")
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


@dataclass
class SelfRefineConfig(GRPOConfig):
    r"""
    Configuration class for the [`SelfRefineTrainer`].

    Inherits every parameter of [`~trl.GRPOConfig`] (generation, vLLM, continuous batching, off-policy clipping) and
    adds those of the rounds, of the implicit weights and of the offline part. A round generates
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
            use 4 or more. One is taken only with `implicit_weight_scope="round"`.
        question_strategy (`str`, *optional*, defaults to `"lowest_weight"`):
            Which questions are asked: `"lowest_weight"` (those whose offline answers weigh least), `"random"`,
            `"all"`.
        question_fraction (`float`, *optional*, defaults to `0.25`):
            Share of the rows that `"lowest_weight"` and `"random"` choose from.
        question_weighting (`bool`, *optional*, defaults to `True`):
            Multiply the responses' weights by the explicit weight of their question, scaled to mean one over the
            questions of the round.
        implicit_weight_temperature (`float`, *optional*, defaults to `0.1`):
            tau of the softmax over a question's responses, in nats per token.
        implicit_weight_scope (`str`, *optional*, defaults to `"question"`):
            Which responses share the weight: `"question"` (those of the same question: a softmax over G), or `"round"`
            (all of a round). The latter also prefers questions that are easy for the validation rows to pull, and is
            there for `num_generations=1`, as in the published safety setting.
        response_estimator (`str`, *optional*, defaults to `"lookahead"`):
            How responses are scored: `"lookahead"` compares the model with itself after `lookahead_steps` validation
            steps, `"alignment"` takes the inner product of a response's gradient with these steps (the same to first
            order, by one forward and backward in place of two forwards), `"value_function"` compares it with a tracker
            that is trained on the offline rows without validation (one more forward and backward of the offline rows
            in every step).
        lookahead_steps (`int`, *optional*, defaults to `4`):
            K, validation steps of the look-ahead.
        online_loss_weight (`float`, *optional*, defaults to `0.5`):
            Share of the responses in the training term, in [0, 1); the offline rows have the rest.
        validation_loss_weight (`float`, *optional*, defaults to `0.5`):
            lambda, the weight of the validation loss in the model's objective, in [0, 1).
        validation_batch_size (`int`, *optional*):
            Validation rows per optimizer step, over all processes. Defaults to the offline rows of a step.
        validation_weights (`dict[str, float]`, *optional*):
            Weight of each validation set when several are given.
        selection_split (`float`, *optional*, defaults to `0.3`):
            Share of each validation set that only chooses between the candidates of a round, if no
            `selection_dataset` is given.
        patience (`int`, *optional*, defaults to `2`):
            Stop after so many rounds in a row that were rolled back.
        weight_estimator (`str`, *optional*, defaults to `"value_function"`):
            Estimator of the explicit weights, learned before the first round by a pilot run; `"none"` for equal
            weights. Not used if `train_dataset` has a column `data_weight`.
        pilot_steps, pilot_learning_rate, pilot_batch_size, pilot_scored_rows, pilot_feature_depth, pilot_smoothing:
            As in [`BilevelSFTConfig`]; the learning rate is that of the look-ahead, too.
        tracked_rows (`int`, *optional*, defaults to `10`):
            Offline rows of highest and of lowest weight whose text the trackers of `report_to` are shown; 0 for none.
        max_length (`int`, *optional*, defaults to `1024`):
            Length at which offline and validation rows are cut.
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
    question_weighting: bool = field(
        default=True, metadata={"help": "Multiply responses' weights by their question's explicit weight."}
    )
    implicit_weight_temperature: float = field(
        default=0.1, metadata={"help": "tau of the softmax over a question's responses, in nats per token."}
    )
    implicit_weight_scope: str = field(
        default="question", metadata={"help": "Responses that share the weight: of a 'question', or of a 'round'."}
    )
    response_estimator: str = field(
        default="lookahead",
        metadata={"help": "How responses are scored: 'lookahead', 'alignment' or 'value_function'."},
    )
    lookahead_steps: int = field(default=4, metadata={"help": "K, validation steps of the look-ahead."})
    online_loss_weight: float = field(
        default=0.5, metadata={"help": "Share of the responses in the training term, in [0, 1)."}
    )
    validation_loss_weight: float = field(
        default=0.5, metadata={"help": "lambda, weight of the validation loss in the objective, in [0, 1)."}
    )
    validation_batch_size: int | None = field(
        default=None, metadata={"help": "Validation rows per step. Default: as many as offline rows."}
    )
    validation_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Weight of each validation set when several are given. Default: equal."}
    )
    selection_split: float = field(
        default=0.3, metadata={"help": "Share of the validation rows that only chooses between candidates."}
    )
    patience: int = field(default=2, metadata={"help": "Stop after so many rounds in a row that were rolled back."})
    weight_estimator: str = field(
        default="value_function",
        metadata={"help": "Estimator of the explicit weights, or 'none'. Not used with a column 'data_weight'."},
    )
    pilot_steps: int | None = field(default=None, metadata={"help": "Steps of the pilot run."})
    pilot_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the pilot run and of the look-ahead."}
    )
    pilot_batch_size: int | None = field(default=None, metadata={"help": "Training rows per pilot step."})
    pilot_scored_rows: int = field(
        default=512, metadata={"help": "Rows that the pilot run scores; the others' weights are predicted. 0: all."}
    )
    pilot_feature_depth: float = field(
        default=0.3, metadata={"help": "Share of the layers that are computed to predict a weight, in (0, 1]."}
    )
    pilot_smoothing: bool = field(
        default=True,
        metadata={"help": "Weigh a scored row by what rows like it score, too, as far as that explains weights."},
    )
    tracked_rows: int = field(
        default=10,
        metadata={"help": "Offline rows of highest and of lowest weight whose text trackers are shown; 0 for none."},
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Length at which offline and validation rows are cut."}
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
        for name in ("num_rounds", "steps_per_round", "lookahead_steps", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        _one_of("implicit_weight_scope", self.implicit_weight_scope, SCOPES)
        generations = self.num_generations
        if generations is None or generations < 1 or (generations == 1 and self.implicit_weight_scope == "question"):
            raise ValueError(
                f"`num_generations={generations}`: implicit weights compare the responses of one question, so one "
                "response carries no signal. Use at least 2, better 4; or `implicit_weight_scope='round'`, which "
                "compares responses to different questions."
            )
        if self.implicit_weight_scope == "round" and self.use_vllm and self.vllm_mode == "server":
            raise ValueError(
                "`implicit_weight_scope='round'` with `vllm_mode='server'` is not supported: TRL asks vLLM once per "
                "group for all of its responses, and a round has many questions. Use 'question', or "
                "`vllm_mode='colocate'`."
            )
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
        if generations == 1:
            # TRL refuses groups of one; the group that it is given later is the round.
            self.num_generations = self.per_device_train_batch_size * generate_every
            if self.num_generations < 2:
                raise ValueError("A round of one response compares nothing. Raise `steps_per_round`.")
        super().__post_init__()
        self.num_generations = generations
        if self.tracked_rows < 0:
            raise ValueError(f"`tracked_rows` must be at least 0, got {self.tracked_rows}.")
        _one_of("question_strategy", self.question_strategy, STRATEGIES)
        _one_of("response_estimator", self.response_estimator, RESPONSE_ESTIMATORS)
        _in_range("validation_loss_weight", self.validation_loss_weight, 0.0, 1.0)
        _in_range("online_loss_weight", self.online_loss_weight, 0.0, 1.0)
        if not 0 < self.selection_split < 1:
            raise ValueError(f"`selection_split` must lie between 0 and 1, got {self.selection_split}.")
        if not 0 < self.question_fraction <= 1:
            raise ValueError(f"`question_fraction` must lie in (0, 1], got {self.question_fraction}.")
        if not 0 < self.implicit_weight_temperature < float("inf"):
            raise ValueError(
                f"`implicit_weight_temperature` must be above 0 and finite, got {self.implicit_weight_temperature}."
            )
        if self.num_iterations != 1:
            raise ValueError(
                f"`num_iterations={self.num_iterations}`: each response is trained on once. Leave it out."
            )
        if self.scale_rewards != "none":
            raise ValueError(
                f"`scale_rewards={self.scale_rewards!r}` would undo the scale of the implicit weights. Leave it out."
            )
        if not self.disable_dropout:
            raise ValueError(
                "`disable_dropout=False`: TRL samples and trains in training mode, so with dropout the responses' "
                "log-probabilities are not those of the policy that sampled them. Leave it out."
            )
        if self.eval_strategy != "no":
            raise ValueError(
                f"`eval_strategy={self.eval_strategy!r}`: `eval_dataset` is looked at once per round, see the ledger. "
                "Leave it out."
            )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns=True` drops the questions' numbers. Leave it out.")
        if self.response_estimator == "value_function" and self.validation_loss_weight == 0:
            raise ValueError(
                "`response_estimator='value_function'` with `validation_loss_weight=0`: tracker and model are then "
                "trained on the same rows, and the validation rows have no say in the scores. Set "
                "`validation_loss_weight` above 0, or use 'lookahead' or 'alignment'."
            )
        if self.fp16:
            raise ValueError(
                "`fp16=True` is not supported: the look-ahead and the tracker take steps of their own, without loss "
                "scaling. Use bf16."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"`multi_objective_aggregation={self.multi_objective_aggregation!r}` would undo the scale of the "
                "implicit weights. Leave it out."
            )
        if getattr(self, "cast_lm_head_to_fp32", False):
            raise ValueError("`cast_lm_head_to_fp32=True` is not supported: the offline rows use the same head.")
        self._check_sampling()

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
        if getattr(self, "vllm_structured_outputs_regex", None) is not None:
            raise ValueError("`vllm_structured_outputs_regex` restricts what is sampled. Leave it out.")
        for name, value in given.items():
            if value not in SAMPLING[name]:
                raise ValueError(
                    f"`{name}={value}` samples from another distribution than the model's, so the responses' "
                    f"log-probabilities would be wrong. Use {SAMPLING[name][0]!r}."
                )
