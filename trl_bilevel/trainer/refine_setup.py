"""What happens once in a self-refining run: checks, splits, the making of parts, and its checkpoint files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl import GRPOConfig
from trl.data_utils import is_conversational
from trl.import_utils import is_vllm_available

from ..data.identity import SAMPLE_ID, count_overlap
from ..estimators import AlignmentEstimator, Estimator, EstimatorHost, LookaheadEstimator, ValueFunctionEstimator
from . import rounds, selection
from .checks import check_format
from .self_refine_config import SelfRefineConfig
from .setup import MIN_CALIBRATION_ROWS, prepare_rows

if TYPE_CHECKING:
    from .offline import OfflinePart
    from .self_refine_trainer import SelfRefineTrainer

MIN_SELECTION_ROWS = 8
TEMPLATE_COLUMN = "chat_template_kwargs"


def resolve_config(args: GRPOConfig | None, model: Any) -> SelfRefineConfig:
    """The config to use; the defaults if none is given."""
    if isinstance(args, SelfRefineConfig):
        return args
    if args is not None:
        raise TypeError(
            f"`args` must be a `SelfRefineConfig`, got `{type(args).__name__}`: rounds need settings of their own."
        )
    name = model if isinstance(model, str) else model.config._name_or_path
    return SelfRefineConfig(f"{name.split('/')[-1]}-Self-Refine")


def check_rows(args: SelfRefineConfig, train: Any, prompts: Any) -> Dataset:
    """Check the offline rows; returns the questions (`prompt`, `sample_id`)."""
    for name, dataset, columns in (
        ("train_dataset", train, ("prompt", "completion")),
        ("prompt_dataset", prompts, ("prompt",)),
    ):
        if dataset is None and name == "prompt_dataset":
            continue
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`{name}` must be a `datasets.Dataset`, got `{type(dataset).__name__}`.")
        missing = [column for column in columns if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"`{name}` has no column {missing[0]!r} (it has {dataset.column_names}): a question must stand apart "
                "from its answer to be answered anew. Split conversations into `prompt` and `completion`."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty.")
    if prompts is not None and args.question_strategy == "lowest_weight":
        raise ValueError(
            "`question_strategy='lowest_weight'` chooses by the weights of offline answers, and the questions of "
            "`prompt_dataset` have none. Use 'random' or 'all'."
        )
    questions = (train if prompts is None else prompts).select_columns(["prompt"])
    return questions.add_column(SAMPLE_ID, list(range(len(questions))))


def split_validation(
    args: SelfRefineConfig, validation: Dataset | Mapping[str, Dataset] | None, selection: Dataset | None
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Rows that pull and rows that select, by set; a seeded split of each set if there is no `selection_dataset`."""
    if validation is None:
        raise ValueError("`validation_dataset` is required: it says what good means.")
    sets = dict(validation) if isinstance(validation, Mapping) else {"validation": validation}
    named = {f"`validation_dataset` {name!r}": rows for name, rows in sets.items()}
    for argument, rows in (named | ({} if selection is None else {"`selection_dataset`": selection})).items():
        if not isinstance(rows, Dataset):
            raise TypeError(f"{argument} must be a `datasets.Dataset`, got `{type(rows).__name__}`.")
    if selection is not None:
        return sets, {"selection": selection}
    pulling, selecting = {}, {}
    for index, (name, rows) in enumerate(sets.items()):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + 15_485_863 + index))
        count = round(args.selection_split * len(rows))
        selecting[name] = rows.select(sorted(order[:count].tolist()))
        pulling[name] = rows.select(sorted(order[count:].tolist()))
    total, pulled = sum(map(len, sets.values())), sum(map(len, pulling.values()))
    if total - pulled < MIN_SELECTION_ROWS or pulled < MIN_CALIBRATION_ROWS:
        needed = max(MIN_SELECTION_ROWS / args.selection_split, MIN_CALIBRATION_ROWS / (1 - args.selection_split))
        raise ValueError(
            f"`validation_dataset` has {total} rows, too few to split: {pulled} would drive the scores (at least "
            f"{MIN_CALIBRATION_ROWS} are needed) and {total - pulled} select the model (at least "
            f"{MIN_SELECTION_ROWS}). Give at least {int(needed) + 1} rows, or change `selection_split`."
        )
    return pulling, selecting


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


def check_template(trainer: SelfRefineTrainer, questions: Dataset) -> None:
    """Conversational prompts need a chat template."""
    if is_conversational(questions[0]) and not getattr(trainer.processing_class, "chat_template", None):
        raise ValueError(
            "The prompts are conversational, but the tokenizer has no chat template. Set "
            "`processing_class.chat_template`, or give prompts as text."
        )


def with_template(args: SelfRefineConfig, rows: Dataset) -> Dataset:
    """The rows, with the run's `chat_template_kwargs` for TRL to read where they are conversational.

    TRL takes these settings from the config for the questions, and from a column for rows with answers.

    Raises:
        ValueError: if the rows bring settings of their own, which the questions would not follow.
    """
    if TEMPLATE_COLUMN in rows.column_names:
        raise ValueError(
            f"A dataset has the column {TEMPLATE_COLUMN!r}, which would reach its answers but not the questions that "
            "are asked anew. Remove it, and set `chat_template_kwargs` of the config."
        )
    if not args.chat_template_kwargs or len(rows) == 0 or not is_conversational(rows[0]):
        return rows
    return rows.add_column(TEMPLATE_COLUMN, [args.chat_template_kwargs] * len(rows))


def check_reporting(rows: Any) -> None:
    """`eval_dataset` must be one set of rows."""
    if rows is not None and not isinstance(rows, Dataset):
        raise TypeError(f"`eval_dataset` must be a `datasets.Dataset`, got `{type(rows).__name__}`.")


def prepare_selection(
    offline: OfflinePart, args: SelfRefineConfig, sets: Mapping[str, Dataset]
) -> tuple[Dataset, Tensor]:
    """The selection rows of all sets, tokenised each as a set of its own, and their weights (sum one)."""
    for name, rows in sets.items():
        check_format(offline.trainer, rows, f"The set {name!r} of the rows that select the model")
    prepared = {
        name: prepare_rows(offline.trainer, with_template(args, rows)).select_columns(["input_ids", "labels"])
        for name, rows in sets.items()
        if len(rows)
    }
    given = args.validation_weights if isinstance(args.validation_weights, dict) else {}
    shares = [torch.full((len(rows),), given.get(name, 1.0) / max(1, len(rows))) for name, rows in prepared.items()]
    rows = concatenate_datasets(list(prepared.values()))
    weights = torch.cat(shares)
    if len(rows) < MIN_SELECTION_ROWS:
        raise ValueError(
            f"{len(rows)} usable rows are left to select the model, at least {MIN_SELECTION_ROWS} are needed. Give "
            "more rows, or raise `max_length`."
        )
    return rows, weights / weights.sum()


def warn_of_overlaps(
    selecting: Dataset, pulling: Mapping[str, Dataset], train: Dataset, report: Dataset | None
) -> None:
    """Warn of rows that stand on two sides that are to be kept apart. All sets are prepared."""
    pairs = [
        (rows, f"drive the scores (set {name!r})", "select the model", selecting) for name, rows in pulling.items()
    ]
    pairs.append((train, "are trained on", "select the model", selecting))
    if report is not None:
        pairs += [(rows, f"drive the scores (set {name!r})", "only report", report) for name, rows in pulling.items()]
        pairs += [
            (selecting, "select the model", "only report", report),
            (train, "are trained on", "only report", report),
        ]
    for first, does, should, second in pairs:
        overlap = count_overlap(first, second)
        if overlap:
            warnings.warn(
                f"{overlap} of the {len(second)} rows that should {should} are also among those that {does}: the "
                "choice of model, or the report, will be flattered. Remove duplicates from `validation_dataset`, "
                "`selection_dataset` and `eval_dataset`.",
                UserWarning,
                stacklevel=3,
            )


def make_response_estimator(args: SelfRefineConfig, host: EstimatorHost) -> Estimator:
    """The estimator that scores responses."""
    if args.response_estimator == "lookahead":
        return LookaheadEstimator(host, lookahead_steps=args.lookahead_steps, max_grad_norm=args.max_grad_norm)
    if args.response_estimator == "alignment":
        # In nats per token, like the others, so that the temperature means the same.
        return AlignmentEstimator(
            host,
            averaging=0.0,
            displacement=True,
            unit_length=False,
            lookahead_steps=args.lookahead_steps,
            max_grad_norm=args.max_grad_norm,
        )
    return ValueFunctionEstimator(
        host,
        max_grad_norm=args.max_grad_norm,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def text_of(part: Any) -> str:
    """A prompt or completion as text."""
    return part if isinstance(part, str) else "\n".join(str(message["content"]) for message in part)


def checkpoint_files(processes: int) -> list[str]:
    """What a complete checkpoint of a self-refining run has."""
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    return [
        *random_states,
        *(selection.STATE_FILE, selection.SUMMARY_FILE, rounds.STATE_FILE, rounds.SUMMARY_FILE),
        *(rounds.BUFFER_FILE.format(rank=rank) for rank in range(processes)),
    ]


def round_shape(trainer: SelfRefineTrainer) -> dict[str, int | None]:
    """Settings that a round in the making depends on."""
    args = trainer.args
    names = ("steps_per_round", "gradient_accumulation_steps", "per_device_train_batch_size", "num_generations")
    return {name: getattr(args, name) for name in names} | {"processes": trainer.accelerator.num_processes}


def is_exhausted(folder: str, patience: int) -> bool:
    """True if the run that a checkpoint belongs to had ended: so many rounds in a row were rolled back."""
    file = Path(folder) / rounds.SUMMARY_FILE
    return file.is_file() and json.loads(file.read_text())["rejected"] >= patience


def save_rounds(trainer: SelfRefineTrainer, folder: str) -> None:
    """Write the state of the rounds into a checkpoint; every process writes the responses that it holds."""
    buffer = trainer._buffered_inputs if trainer.rounds.snapshot is not None else None
    extra = {f"estimator.{name}": value for name, value in trainer.estimator.tensors().items()}
    trainer.rounds.save(folder, buffer or [], extra, trainer.accelerator.process_index, round_shape(trainer))


def load_rounds(trainer: SelfRefineTrainer, folder: str) -> None:
    """Restore what `save_rounds` wrote."""
    accelerator = trainer.accelerator
    buffer, extra = trainer.rounds.load(folder, accelerator.device, accelerator.process_index, round_shape(trainer))
    trainer._buffered_inputs = buffer  # type: ignore[assignment]
    trainer.estimator.load_tensors({k.removeprefix("estimator."): v for k, v in extra.items()})
