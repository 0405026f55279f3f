"""Answers put behind questions that they do not belong to, to learn what belonging looks like."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Mismatch(NamedTuple):
    """A row's question with the answer of another row.

    Attributes:
        row (`dict`): `input_ids` and `labels`, lists of as many tokens.
        question, answer (`int`): places in the batch of the rows that it has the question and the answer of.
    """

    row: dict[str, list[int]]
    question: int
    answer: int


def mismatched(batch: Mapping[str, Any]) -> list[Mismatch]:
    """Each row's question with the answer of the next row of the batch that asks and answers something else.

    A question is what comes before the first token that is scored, an answer all from there on. Rows without a
    question, or without such a next row, are left out. No row is longer than the batch is wide.

    Args:
        batch: a collated batch of rows in random order (`input_ids`, `attention_mask`, `labels`), padded on either
            side.
    """
    width = batch["input_ids"].shape[1]
    rows = [_parts(*parts) for parts in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)]
    out = []
    for place, (question, answer, _) in enumerate(rows):
        if not question or not answer:
            continue
        order = [*range(place + 1, len(rows)), *range(place)]
        other = next((n for n in order if rows[n][0] and rows[n][0] != question and rows[n][1] != answer), None)
        if other is None:
            continue
        _, tokens, labels = rows[other]
        # Room for a token of the answer at least.
        start = question[: width - 1]
        row = {"input_ids": start + tokens, "labels": [-100] * len(start) + labels}
        out.append(Mismatch({name: values[:width] for name, values in row.items()}, place, other))
    return out


def _parts(ids: Tensor, labels: Tensor, mask: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Tokens of the question, tokens of the answer, and labels of the answer."""
    real = mask.bool()
    tokens, wanted = ids[real].tolist(), labels[real].tolist()
    first = next((n for n, label in enumerate(wanted) if label != -100), len(wanted))
    return tokens[:first], tokens[first:], wanted[first:]
