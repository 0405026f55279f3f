"""Rows to measure: prompts and answers from the usual formats, and their tokens as TRL's SFT makes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.formats import Part, answered, assistant, user


@dataclass(frozen=True)
class Row:
    """One row: what is asked and what should be answered, as text or as chat messages alike.

    A row of plain text has an empty prompt: all of it is scored, and nothing can be asked.
    """

    prompt: Part
    completion: Part


@dataclass(frozen=True)
class Tokens:
    """A row's tokens; those from `start` on are scored."""

    ids: list[int]
    start: int


def read_rows(dataset: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a data set in one of the formats of `data/formats.py`; of chats, the last answer is what is scored.

    Raises:
        ValueError: for other columns, and for a chat that does not end with an answer.
    """
    return [Row(*answered(row, where=f"Row {number}")) for number, row in enumerate(dataset)]


def question(text: Part, tokenizer: Any) -> Part:
    """A request as the model is asked it: a chat if its tokenizer has a template, else the text as it is."""
    return user(text) if isinstance(text, str) and tokenizer.chat_template else text


def row_of(prompt: Part, response: str) -> Row:
    """A prompt and a response to it, in the prompt's format."""
    return Row(prompt, response if isinstance(prompt, str) else assistant(response))


def render(prompt: Part, tokenizer: Any, template: Mapping[str, Any]) -> str:
    """A prompt as text that the answer follows.

    Args:
        template (`dict`): further arguments of the chat template.

    Raises:
        ValueError: for a chat, if the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt
    _check_template(tokenizer)
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template))


def encode(row: Row, tokenizer: Any, template: Mapping[str, Any], max_length: int) -> Tokens:
    """A row's tokens, cut at `max_length`: those of TRL's `SFTTrainer` for prompts and completions.

    Raises:
        ValueError: as `render`.
    """
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        eos = tokenizer.eos_token or ""
        whole = row.completion if eos and row.completion.endswith(eos) else row.completion + eos
        ids = tokenizer(row.prompt + whole)["input_ids"]
        prompt = tokenizer(row.prompt)["input_ids"] if row.prompt else []
    else:
        _check_template(tokenizer)
        settings = {"tokenize": True, "return_dict": True, **template}
        ids = tokenizer.apply_chat_template([*row.prompt, *row.completion], **settings)["input_ids"]
        prompt = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, **settings)["input_ids"]
    from trl.data_utils import common_prefix_length

    # Tokens may merge where the two meet: the answer starts where the sequences part.
    return Tokens(ids[:max_length], common_prefix_length(prompt, ids))


def digest(values: Sequence[Any]) -> str:
    """The first 16 digits of a sha256 of rows or tokens, to tell whether two runs measured the same."""
    text = json.dumps(list(values), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"The rows are chats, and the tokenizer of {tokenizer.name_or_path!r} has no chat template. Give prompt "
            "and completion as text, or a model with a template."
        )
