"""Rows to measure: prompts and answers from the usual formats, and their tokens as TRL's SFT makes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..data.formats import Part, answered, assistant, user
from ..data.tokens import Tokeniser


class Row(NamedTuple):
    """What is asked and what should be answered, as text or as chat messages alike.

    A row of plain text has an empty prompt: all of it is scored, and nothing can be asked.
    """

    prompt: Part
    completion: Part


def read_rows(dataset: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a data set in one of the formats of `data/formats.py`; of chats, the last answer is what is scored."""
    return [Row(*answered(row, where=f"Row {number}")) for number, row in enumerate(dataset)]


def question(text: Part, tokenizer: Any) -> Part:
    """A request as the model is asked it: a chat if its tokenizer has a template, else the text as it is."""
    return user(text) if isinstance(text, str) and tokenizer.chat_template else text


def row_of(prompt: Part, response: str) -> Row:
    """A prompt and a response to it, in the prompt's format."""
    return Row(prompt, response if isinstance(prompt, str) else assistant(response))


def render(prompt: Part, tokenizer: Any, template: Mapping[str, Any]) -> str:
    """A prompt as text that the answer follows; `template` are further arguments of the template that chats need."""
    if isinstance(prompt, str):
        return prompt
    _check_template(tokenizer)
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template))


def encode(row: Row, tokenizer: Any, template: Mapping[str, Any]) -> dict[str, list[int]]:
    """A row's `input_ids`, and `labels` that are -100 where nothing is scored; arguments as of `render`."""
    text = isinstance(row.completion, str)
    if not text:
        _check_template(tokenizer)
    fields = row._asdict() if row.prompt else {"text" if text else "messages": row.completion}
    return Tokeniser(tokenizer, max_length=None, template=template).row(fields)


def digest(values: Sequence[Any]) -> str:
    """The first 16 digits of a sha256 of rows or tokens, to tell whether two runs measured the same."""
    return hashlib.sha256(json.dumps(list(values), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"The rows are chats, and the tokenizer of {tokenizer.name_or_path!r} has no chat template. Give prompt "
            "and completion as text, or a model with a template."
        )
