"""The offline half of a self-refining run: its rows, checked and tokenised once, and their part of every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from trl.data_utils import is_conversational

from ..data.checks import check_filled, check_same_format, warn_of_overlap
from ..data.export import given_weights
from ..data.identity import DATA_WEIGHT
from ..data.rows import Rows, padded, plain_rows
from ..data.sampling import WeightedSampler
from ..data.tokens import Tokeniser
from ..data.trusted import TrustedSets, set_weights
from ..weights.choose import MIN_TRUSTED_ROWS, check_sizes
from ..weights.processes import Processes
from ..weights.state import TrainingWeights
from .checks import check_given_weights
from .choosing import weight_settings, weights_identity
from .preparation import prepared_trusted, told_of_dropped
from .self_refine_config import SelfRefineConfig
from .weighted_loss import TrustedPart

MIN_SELECTION_ROWS = 8
# Added to the seed: the rows that select are drawn independently of those that calibration holds back.
SELECTION_SEED = 15_485_863
TEMPLATE_COLUMN = "chat_template_kwargs"


@dataclass
class RefineRows:
    """The rows of a run, tokenised.

    Attributes:
        rows, given (`Tensor` float32 `[rows]`, *optional*): offline rows, and their weights of a column `data_weight`.
        trusted, selection: trusted rows that pull, and those that choose between the candidates of a round.
        report (*optional*): rows whose loss is told.
    """

    rows: Rows
    given: Tensor | None
    trusted: TrustedSets
    selection: TrustedSets
    report: Rows | None

    @classmethod
    def of(
        cls, args: SelfRefineConfig, read: Callable[[Dataset], Rows], train: Dataset, sets: Any, select: Any, tell: Any
    ) -> RefineRows:
        """Tokenise the caller's sets, and split the trusted ones if none is given to select by.

        Args:
            read: tokenises rows.
            train, sets, select, tell: `train_dataset`, the trusted sets, `selection_dataset`, `eval_dataset`.

        Raises:
            ValueError, TypeError: for rows that cannot work; the message names argument, value and remedy.
        """
        for name, rows in {
            "`train_dataset`": train,
            **{f"`validation_dataset` {k!r}": v for k, v in sets.items()},
        }.items():
            check_filled(rows, name)
        given = given_weights(train) if DATA_WEIGHT in train.column_names else None
        shares = set_weights(args.validation_weights if isinstance(args.validation_weights, dict) else None, sets)
        # The first process tokenises, the others read its cache.
        with PartialState().main_process_first():
            offline = told_of_dropped(read(train))
            prepare = lambda part, name: read(part).dataset  # noqa: E731
            trusted = prepared_trusted(args, sets, shares, offline, prepare, True, offline.collate)
            report = None if tell is None else read(tell)
            selection = None
            if select is not None:
                check_same_format(select, "`selection_dataset`", True)
                selection = TrustedSets({"selection": read(select)}, {"selection": 1.0})
        assert trusted is not None
        if len(offline) == 0:
            raise ValueError(
                f"None of the {len(train)} rows of `train_dataset` has a token to learn from within `max_length="
                f"{args.max_length}`. Raise it, or look at the rows: are their answers empty?"
            )
        if selection is None:
            trusted, selection = _split(trusted, args)
        if len(selection) < MIN_SELECTION_ROWS:
            raise ValueError(
                f"{len(selection)} usable rows of `selection_dataset` are left to select the model, at least "
                f"{MIN_SELECTION_ROWS} are needed. Give more rows, or raise `max_length`."
            )
        pulling = [(f"drive the scores (set {name!r})", rows.dataset) for name, rows in trusted.sets.items()]
        others = [*pulling, ("are trained on", offline.dataset)]
        for rows in selection.sets.values():
            warn_of_overlap(rows.dataset, "select the model", others)
        others += [("select the model", rows.dataset) for rows in selection.sets.values()]
        if report is not None:
            warn_of_overlap(report.dataset, "only report", others)
        return cls(offline, given, trusted, selection, report)

    def weights(self, args: SelfRefineConfig, train: Dataset, sets: Any, learns: bool) -> TrainingWeights:
        """The explicit weights: given ones, equal ones, or (`learns`) those that are chosen before the first round.

        Args:
            train, sets: the caller's rows, by which a checkpoint's weights are known again.
        """
        out = TrainingWeights(self.rows.kept, weights_identity(weight_settings(args), self.rows, train, sets))
        if learns:
            check_sizes(self.rows, self.trusted)
            return out
        given = torch.ones(self.rows.count) if self.given is None else self.given
        check_given_weights(given, self.rows.kept)
        out.give(given)
        return out


def _split(trusted: TrustedSets, args: SelfRefineConfig) -> tuple[TrustedSets, TrustedSets]:
    """Rows that pull and rows that select: a seeded split of each set."""
    pulling, selecting = trusted.split(args.seed + SELECTION_SEED, args.selection_split)
    if len(pulling) < MIN_TRUSTED_ROWS or len(selecting) < MIN_SELECTION_ROWS:
        needed = max(MIN_SELECTION_ROWS / args.selection_split, MIN_TRUSTED_ROWS / (1 - args.selection_split))
        raise ValueError(
            f"`validation_dataset` has {len(trusted)} usable rows, too few to split: {len(pulling)} would drive the "
            f"scores (at least {MIN_TRUSTED_ROWS} are needed) and {len(selecting)} select the model (at least "
            f"{MIN_SELECTION_ROWS}). Give at least {int(needed) + 1} rows, or change `selection_split`."
        )
    return pulling, selecting


def read_rows(args: SelfRefineConfig, tokenizer: Any, rows: Dataset) -> Rows:
    """Tokenised rows, opening as the questions do where they are conversational (`chat_template_kwargs`).

    Raises:
        ValueError: if there is no chat template, or the rows bring settings for it that questions would not follow.
    """
    if TEMPLATE_COLUMN in rows.column_names:
        raise ValueError(
            f"A dataset has the column {TEMPLATE_COLUMN!r}, which would reach its answers but not the questions that "
            "are asked anew. Remove it, and set `chat_template_kwargs` of the config."
        )
    if len(rows) and is_conversational(rows[0]) and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The prompts are conversational, but the tokenizer has no chat template. Set "
            "`processing_class.chat_template`, or give prompts as text."
        )
    read = Tokeniser(tokenizer, args.max_length, template=args.chat_template_kwargs)
    return plain_rows(read.prepare(rows), padded(padding(tokenizer)), len(rows))


def padding(tokenizer: Any) -> int:
    """The token that fills up rows."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


@dataclass
class OfflinePart:
    """Weighted rows and trusted rows as a share of each optimizer step: a pure function of the step.

    Attributes:
        rows, weights: offline rows, and by what they are drawn.
        trusted (`TrustedPart`, *optional*): rows that pull; as many in a step as offline rows.
        share (`float`): of the offline loss in the objective.
        rows_per_step (`int`): offline rows, over all processes.
        micro_batches (`int`): of a step, on each process.
        seed, data_seed (`int`): of the order of the offline rows, and of their draws.
        processes: this one among the others.
    """

    rows: Rows
    weights: TrainingWeights
    trusted: TrustedPart | None
    share: float
    rows_per_step: int
    micro_batches: int
    seed: int
    data_seed: int
    processes: Processes

    @classmethod
    def of(cls, args: SelfRefineConfig, prepared: RefineRows, weights: TrainingWeights, pad: int) -> OfflinePart:
        """The part under a run's settings."""
        lam, rho, processes = args.validation_loss_weight, args.online_loss_weight, Processes.now()
        micro_batches, rows = args.gradient_accumulation_steps, prepared.rows
        per_step = args.train_batch_size * micro_batches * processes.count
        return cls(
            rows,
            weights,
            TrustedPart.of(prepared.trusted, rows.collate, lam, per_step, args.seed, pad) if lam > 0 else None,
            share=(1 - lam) * (1 - rho),
            rows_per_step=per_step,
            micro_batches=micro_batches,
            seed=args.seed,
            data_seed=args.seed if args.data_seed is None else args.data_seed,
            processes=processes,
        )

    def __post_init__(self) -> None:
        self._epoch = -1
        self._places: list[int] = []

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
        offline rows, plus the trusted rows' part of the objective.
        """
        rank, count = self.processes.rank, self.processes.count
        own = self.places(step)[rank::count]
        size = math.ceil(len(own) / self.micro_batches)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        batches = [self.rows.batch(part) for part in parts]
        scored = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in batches]).sum()
        factor = self.share / max(1, int(self.processes.sum(scored)))
        out = [(batch, torch.full((len(part),), factor)) for batch, part in zip(batches, parts, strict=True)]
        if self.trusted is None:
            return out
        trusted = self.trusted.batches(step, len(out))
        return [
            (batch, factors) if rows is None else (self.trusted.join(batch, rows), torch.cat([factors, own]))
            for (batch, factors), (rows, own) in zip(out, trusted, strict=True)
        ]
