"""The offline half of a self-refining run: its rows, checked and tokenised once, and their part of every step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from trl.data_utils import is_conversational

from ..data.batches import concatenate_batches
from ..data.checks import check_dataset, check_filled, check_same_format, trusted_sets
from ..data.identity import DATA_WEIGHT, SAMPLE_ID, add_sample_ids, count_overlap
from ..data.rows import Rows, padded, plain_rows
from ..data.sampling import WeightedSampler
from ..data.tokens import Tokeniser
from ..data.trusted import TrustedSets, set_weights
from ..weights.choose import MIN_TRUSTED_ROWS
from ..weights.processes import Processes
from ..weights.state import TrainingWeights
from .preparation import given_weights, prepared_trusted, told_of_dropped, without_numbers
from .self_refine_config import SelfRefineConfig

MIN_SELECTION_ROWS = 8
# Added to the seed: the rows that select are drawn independently of those that calibration holds back.
SELECTION_SEED = 15_485_863
TEMPLATE_COLUMN = "chat_template_kwargs"


@dataclass
class RefineRows:
    """What the caller gave, checked.

    Attributes:
        rows, given (`Tensor` float32 `[rows]`, *optional*): offline rows, and their weights of a column `data_weight`.
        questions: `prompt` and `sample_id`.
        trusted (`dict[str, Dataset]`), selection, report: the other sets.
    """

    rows: Dataset
    given: Tensor | None
    questions: Dataset
    trusted: dict[str, Dataset]
    selection: Dataset | None
    report: Dataset | None

    @classmethod
    def of(cls, args: SelfRefineConfig, train: Any, validation: Any, selection: Any, report: Any, prompts: Any) -> Any:
        """Check the caller's data.

        Raises:
            ValueError, TypeError: naming the argument, the value and the remedy.
        """
        named = {"selection_dataset": selection, "eval_dataset": report, "prompt_dataset": prompts}
        for name, rows in {"train_dataset": train, **named}.items():
            if rows is not None or name == "train_dataset":
                check_dataset(rows, f"`{name}`")
        for name, rows, columns in (
            ("train_dataset", train, ("prompt", "completion")),
            ("prompt_dataset", prompts, ("prompt",)),
        ):
            missing = [] if rows is None else [column for column in columns if column not in rows.column_names]
            if missing:
                raise ValueError(
                    f"`{name}` has no column {missing[0]!r} (it has {rows.column_names}): a question must stand apart "
                    "from its answer to be answered anew. Split conversations into `prompt` and `completion`."
                )
        if prompts is not None and args.question_strategy == "lowest_weight":
            raise ValueError(
                "`question_strategy='lowest_weight'` chooses by the weights of offline answers, and the questions of "
                "`prompt_dataset` have none. Use 'random' or 'all'."
            )
        trusted = trusted_sets(validation)
        sets = {"`train_dataset`": train} | {f"`validation_dataset` {name!r}": rows for name, rows in trusted.items()}
        for name, rows in sets.items():
            check_filled(rows, name)
        given = given_weights(train) if DATA_WEIGHT in train.column_names else None
        own = train if given is None else without_numbers(train)
        asked = add_sample_ids(own) if prompts is None else add_sample_ids(prompts.select_columns(["prompt"]))
        return cls(own, given, asked.select_columns(["prompt", SAMPLE_ID]), trusted, selection, report)

    def prepare(self, args: SelfRefineConfig, tokenizer: Any) -> PreparedRows:
        """Tokenise all sets.

        Raises:
            ValueError: if too few rows are left of one.
        """
        if is_conversational(self.questions[0]) and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "The prompts are conversational, but the tokenizer has no chat template. Set "
                "`processing_class.chat_template`, or give prompts as text."
            )
        read = partial(read_rows, args, tokenizer)
        # The first process tokenises, the others read its cache.
        with PartialState().main_process_first():
            rows = told_of_dropped(read(self.rows))
            shares = set_weights(_given_shares(args), self.trusted)
            trusted = prepared_trusted(
                args, self.trusted, shares, rows, lambda part, name: read(part).dataset, True, rows.collate
            )
            assert trusted is not None
            selection = None
            if self.selection is not None:
                check_same_format(self.selection, "`selection_dataset`", True)
                selection = TrustedSets({"selection": read(self.selection)}, {"selection": 1.0})
            report = None if self.report is None else read(self.report)
        if len(rows) == 0:
            raise ValueError(
                f"None of the {rows.count} rows of `train_dataset` has a token to learn from within `max_length="
                f"{args.max_length}`. Raise it, or look at the rows: are their answers empty?"
            )
        whole = len(trusted)
        if selection is None:
            trusted, selection = trusted.split(args.seed + SELECTION_SEED, args.selection_split)
            if len(trusted) < MIN_TRUSTED_ROWS or len(selection) < MIN_SELECTION_ROWS:
                split = args.selection_split
                needed = max(MIN_SELECTION_ROWS / split, MIN_TRUSTED_ROWS / (1 - split))
                raise ValueError(
                    f"`validation_dataset` has {whole} usable rows, too few to split: {len(trusted)} would drive the "
                    f"scores (at least {MIN_TRUSTED_ROWS} are needed) and {len(selection)} select the model (at least "
                    f"{MIN_SELECTION_ROWS}). Give at least {int(needed) + 1} rows, or change `selection_split`."
                )
        if len(selection) < MIN_SELECTION_ROWS:
            raise ValueError(
                f"{len(selection)} usable rows of `selection_dataset` are left to select the model, at least "
                f"{MIN_SELECTION_ROWS} are needed. Give more rows, or raise `max_length`."
            )
        prepared = PreparedRows(rows, trusted, selection, report)
        prepared.warn_of_overlaps()
        return prepared


@dataclass
class PreparedRows:
    """The tokenised rows: offline ones, trusted ones that pull and that select, and those that only report."""

    rows: Rows
    trusted: TrustedSets
    selection: TrustedSets
    report: Rows | None

    def warn_of_overlaps(self) -> None:
        """Warn of rows that stand on two sides that are to be kept apart."""
        trained = {"are trained on": self.rows}
        pulling = {f"drive the scores (set {name!r})": rows for name, rows in self.trusted.sets.items()}
        selecting = {"select the model": rows for rows in self.selection.sets.values()}
        pairs = [
            (does, first, "select the model", second)
            for second in self.selection.sets.values()
            for does, first in (pulling | trained).items()
        ]
        if self.report is not None:
            sides = pulling | selecting | trained
            pairs += [(does, rows, "only report", self.report) for does, rows in sides.items()]
        for does, first, should, second in pairs:
            overlap = count_overlap(first.dataset, second.dataset)
            if overlap:
                warnings.warn(
                    f"{overlap} of the {len(second)} rows that should {should} are also among those that {does}: the "
                    "choice of model, or the report, will be flattered. Remove duplicates from `validation_dataset`, "
                    "`selection_dataset` and `eval_dataset`.",
                    UserWarning,
                    stacklevel=3,
                )


def read_rows(args: SelfRefineConfig, tokenizer: Any, rows: Dataset) -> Rows:
    """Tokenised rows, opening as the questions do where they are conversational (`chat_template_kwargs`).

    Raises:
        ValueError: if the rows bring template settings of their own, which the questions would not follow.
    """
    if TEMPLATE_COLUMN in rows.column_names:
        raise ValueError(
            f"A dataset has the column {TEMPLATE_COLUMN!r}, which would reach its answers but not the questions that "
            "are asked anew. Remove it, and set `chat_template_kwargs` of the config."
        )
    read = Tokeniser(tokenizer, args.max_length, template=args.chat_template_kwargs)
    return plain_rows(read.prepare(rows), padded(padding(tokenizer)), len(rows))


def padding(tokenizer: Any) -> int:
    """The token that fills up rows."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def _given_shares(args: SelfRefineConfig) -> dict[str, float] | None:
    return args.validation_weights if isinstance(args.validation_weights, dict) else None


@dataclass
class OfflinePart:
    """Weighted rows and trusted rows as a share of each optimizer step: a pure function of the step.

    Attributes:
        rows, weights: offline rows, and by what they are drawn.
        trusted: rows that pull; as many in a step as offline rows.
        share, trusted_share (`float`): of either loss in the objective.
        rows_per_step (`int`): offline rows, over all processes.
        micro_batches (`int`): of a step, on each process.
        seed, data_seed (`int`): of the trusted rows and of the order of the offline rows; of their draws.
        pad_token_id (`int`): for joining batches.
        processes: this one among the others.
    """

    rows: Rows
    weights: TrainingWeights
    trusted: TrustedSets
    share: float
    trusted_share: float
    rows_per_step: int
    micro_batches: int
    seed: int
    data_seed: int
    pad_token_id: int
    processes: Processes = field(default_factory=Processes.now)

    def __post_init__(self) -> None:
        self._epoch = -1
        self._places: list[int] = []
        self._draws = self.trusted.samplers(self.rows_per_step, self.seed)

    def places(self, step: int) -> list[int]:
        """Places of the offline rows of an optimizer step, over all processes."""
        out = []
        for number in range(step * self.rows_per_step, (step + 1) * self.rows_per_step):
            epoch, place = divmod(number, len(self.rows))
            if epoch != self._epoch:
                self._epoch = epoch
                order = self.rows.order(self.seed)
                weights: Callable[[], Tensor] = lambda: self.weights.of(self.rows.ids)  # noqa: E731
                self._places = list(WeightedSampler(order, weights, lambda: self._epoch, self.data_seed))
            out.append(self._places[place])
        return out

    def batches(self, step: int) -> list[tuple[dict[str, Any], Tensor]]:
        """This process's micro-batches of a step, each with the factors of its rows' summed losses.

        Summed over micro-batches and processes, factors times losses are `share` times the mean token loss of the
        offline rows plus `trusted_share` times the loss of the trusted rows.
        """
        rank, count = self.processes.rank, self.processes.count
        own = self.places(step)[rank::count]
        size = math.ceil(len(own) / self.micro_batches)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        batches = [self.rows.batch(part) for part in parts]
        scored = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches]).sum()
        factor = self.share / max(1, int(self.processes.sum(scored)))
        out = [(batch, torch.full((len(part),), factor)) for batch, part in zip(batches, parts, strict=True)]
        if self.trusted_share == 0:
            return out
        drawn = [(name, place) for name, sampler in self._draws.items() for place in sampler.rows(step)]
        tokens = torch.stack([self.trusted.sets[name].scored_tokens[place] for name, place in drawn])
        factors = self.trusted_share * self.trusted.row_factors(drawn, tokens)
        for micro, (batch, own_factors) in enumerate(out):
            mine = list(range(micro * count + rank, len(drawn), len(out) * count))
            if mine:
                rows = self.trusted.batch([drawn[n] for n in mine])
                joined = concatenate_batches(batch, rows, self.pad_token_id)
                out[micro] = joined, torch.cat([own_factors, factors[mine]])
        return out
