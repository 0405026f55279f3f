"""[`learn_weights`]: what each training row is worth, for any trainer."""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer

from .._version import __version__
from ..data.checks import check_columns, check_dataset, check_filled, check_same_format, trusted_sets
from ..data.groups import make_groups
from ..data.identity import RESERVED_COLUMNS, count_overlap, fingerprint
from ..data.models import load_model
from ..data.rows import Rows, padded, plain_rows
from ..data.tokens import Tokeniser
from ..data.trusted import TrustedSets, set_weights
from .choose import check_sizes, choose
from .language_model import LanguageModel
from .quantization import keep_4bit_weights
from .result import RowWeights, equal_weights
from .scorer import make_scorer
from .settings import WeightSettings

logger = logging.getLogger(__name__)


def learn_weights(
    model: Any,
    train_dataset: Dataset,
    validation_dataset: Dataset | Mapping[str, Dataset],
    settings: WeightSettings | None = None,
    *,
    processing_class: Any = None,
    max_length: int | None = 1024,
    seed: int = 42,
    bf16: bool | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    dataset_text_field: str = "text",
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool | None = None,
    work_dir: str | Path | None = None,
    disable_tqdm: bool = False,
    **changes: Any,
) -> RowWeights:
    """Learn what each training row is worth, such that a model trained on the weighted rows does best on trusted ones.

    Bilevel data selection (https://huggingface.co/papers/2511.21056) without a trainer. The model's hidden states tell
    whether a row looks like trusted rows, and whether its answer matches its question; nothing is trained. Scores
    become weights by the scores of trusted rows that had no part in them (docs/method.md).

    The model is left as it was, to the last bit. The same arguments give the same weights. Processes that `accelerate
    launch` or `torchrun` started share the scoring, and each returns all weights.

    Example:

    ```python
    from trl_bilevel import learn_weights

    weights = learn_weights("HuggingFaceTB/SmolLM2-135M-Instruct", mixed, trusted)
    weights.to_dataset().to_parquet("ranked.parquet")  # the rows, with data_weight and data_rank
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to fine-tune, before it is: a hub name, a folder (of a model or of an adapter), or a causal
            language model, which may be quantised. A smaller model of the same family will often do.
        train_dataset ([`~datasets.Dataset`]):
            Rows of mixed quality: `prompt` and `completion`, `messages`, `conversations`, text, or tokens
            (`input_ids`, `labels`).
        validation_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Trusted rows that say what good means, at least 8, in the same format; several sets make several
            objectives (`validation_weights`).
        settings ([`WeightSettings`], *optional*): how to choose; single ones can be given by name, too.
        processing_class (*optional*): tokenizer; by default the model's.
        max_length (`int`, *optional*, defaults to 1024): tokens at which rows are cut; None for no limit.
        seed (`int`, defaults to 42): of the rows that the probe is made from, and of a pilot.
        bf16 (`bool`, *optional*): compute in bfloat16 under autocast; by default on GPUs that can.
        completion_only_loss, assistant_only_loss, dataset_text_field, formatting_func, chat_template_kwargs:
            As for TRL's [`~trl.SFTTrainer`].
        model_init_kwargs, trust_remote_code: for loading a model by name. float32 by default, as in TRL.
        gradient_checkpointing (`bool`, *optional*): save memory in the pilot; by default on GPUs.
        work_dir (`str`, *optional*): where scores are noted on the way, so that a killed run goes on from there; the
            notes are removed in the end. Nothing is noted by default.
        disable_tqdm (`bool`): draw no progress bar.
        changes: settings by name, e.g. `selector_preset="reliable"`.

    Returns:
        [`RowWeights`]: `values` float32 in the order of `train_dataset`, mean one; `to_dataset()`, `save()`.

    Raises:
        ValueError, TypeError: for input that cannot work; the message names the argument, the value and the remedy.
        NonFiniteScoreError: if rows get scores that are NaN or infinite.
    """
    settings = replace(settings or WeightSettings(), **changes)
    settings.resolve()
    if settings.published:
        raise ValueError(
            f"`selector_preset={settings.selector_preset!r}`: its weights move with the steps of a training, so there "
            "is nothing to learn before it. Use `BilevelSFTTrainer`, or another preset."
        )
    check_dataset(train_dataset, "`train_dataset`")
    trusted = trusted_sets(validation_dataset)
    given = settings.validation_weights
    shares = set_weights(given if isinstance(given, dict) else None, trusted)
    ours = [name for name in RESERVED_COLUMNS if name in train_dataset.column_names]
    if ours:
        logger.warning(f"The columns {ours} of `train_dataset`, of an earlier choice, are replaced.")
        train_dataset = train_dataset.remove_columns(ours)
    if formatting_func is None:
        named = {f"`validation_dataset` {name!r}": rows for name, rows in trusted.items()}
        for argument, part in ({"`train_dataset`": train_dataset} | named).items():
            check_columns(part, argument, dataset_text_field)
            check_filled(part, argument, dataset_text_field)
    groups, column = None, settings.selector_group_column
    if column is not None:
        if column not in train_dataset.column_names:
            raise ValueError(
                f"`selector_group_column={column!r}` is not a column of `train_dataset`, which has "
                f"{train_dataset.column_names}."
            )
        groups = make_groups(train_dataset.with_format(None)[column]).of_row
    name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if isinstance(model, str):
        kwargs = {"trust_remote_code": trust_remote_code} | dict(model_init_kwargs or {})
        model = load_model(model, **kwargs)
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    keep_4bit_weights(model)
    pairs = {"prompt", "completion"} <= set(train_dataset.column_names) and formatting_func is None
    completions = pairs if completion_only_loss is None else completion_only_loss
    read = Tokeniser(
        processing_class, max_length, dataset_text_field, completions, assistant_only_loss, chat_template_kwargs
    )
    pad = processing_class.pad_token_id
    collate = padded(processing_class.eos_token_id if pad is None else pad)

    def prepared(rows: Dataset) -> Rows:
        return plain_rows(read.prepare(rows, formatting_func), collate, len(rows))

    rows = prepared(train_dataset)
    if len(rows) < rows.count:
        logger.warning(
            f"{rows.count - len(rows)} of {rows.count} training rows have nothing to learn from within `max_length`. "
            "They have no weight (NaN)."
        )
    sets = {}
    for key, part in trusted.items():
        if formatting_func is None:
            check_same_format(part, f"`validation_dataset` {key!r}", completions)
        sets[key] = prepared(part)
        _tell_of_trusted(key, sets[key], rows)
    both = TrustedSets(sets, shares)
    check_sizes(rows, both)
    on_gpu = next(model.parameters()).device.type == "cuda"
    facts: dict[str, Any] = {
        "model": Path(name).name if Path(name).exists() else name,
        "settings": asdict(settings) | {"max_length": max_length, "seed": seed},
        "rows": len(train_dataset),
        "rows_kept": len(rows),
        "fingerprint": fingerprint(train_dataset),
        "validation": {key: {"rows": len(part), "weight": shares[key]} for key, part in sets.items()},
        "versions": {"trl-bilevel": __version__} | {each: version(each) for each in ("trl", "transformers", "torch")},
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "processes": PartialState().num_processes,
    }
    if settings.weight_estimator == "none":
        nothing = torch.full((len(train_dataset),), torch.nan)
        return RowWeights(equal_weights(rows.kept), nothing, facts, train_dataset)
    reader = LanguageModel(model, on_gpu and torch.cuda.is_bf16_supported() if bf16 is None else bf16)
    choice = choose(
        reader,
        rows,
        both,
        settings,
        seed=seed,
        folder=None if work_dir is None else Path(work_dir),
        also={"max_length": max_length},
        groups=groups,
        checkpointing=on_gpu if gradient_checkpointing is None else gradient_checkpointing,
        hidden_progress=disable_tqdm,
    )
    scores, decode = choice.scores[:, 0].contiguous(), processing_class.decode
    scorer = make_scorer(choice, reader, name, read) if formatting_func is None else None
    return RowWeights(choice.weights, scores, facts | choice.facts, train_dataset, choice, decode, scorer)


def _tell_of_trusted(name: str, trusted: Rows, rows: Rows) -> None:
    """Say how many trusted rows are left out, and how many are training rows too."""
    if len(trusted) < trusted.count:
        logger.warning(f"{trusted.count - len(trusted)} of {trusted.count} rows of trusted set {name!r} were dropped.")
    overlap = count_overlap(rows.dataset, trusted.dataset)
    if overlap:
        warnings.warn(
            f"{overlap} of {len(trusted)} rows of `validation_dataset` {name!r} are also training rows: their weights "
            "will be flattered. Remove them from one side.",
            UserWarning,
            stacklevel=3,
        )
