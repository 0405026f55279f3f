"""Rows of any text format as tokens and labels, as TRL's `SFTTrainer` prepares them, without a trainer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from .identity import RESERVED_COLUMNS, SAMPLE_ID

IGNORED = -100


@dataclass(frozen=True)
class Tokeniser:
    """How rows become tokens, and which of them are scored.

    Attributes:
        tokenizer: with `eos_token` and, for conversations, a chat template.
        max_length (`int`, *optional*): rows are cut there, at their end; None for no limit.
        text_field (`str`): column of plain text.
        completion_only (`bool`): score the completions of prompt-completion rows only.
        assistant_only (`bool`): score what the assistant says only (the template must mark it).
        template (`dict`): further arguments of the chat template.
    """

    tokenizer: Any
    max_length: int | None = 1024
    text_field: str = "text"
    completion_only: bool = True
    assistant_only: bool = False
    template: Mapping[str, Any] | None = None

    def prepare(self, rows: Dataset, formatting_func: Callable[[dict[str, Any]], str] | None = None) -> Dataset:
        """Tokenised rows (`input_ids`, `labels`, `sample_id`: the row's number) that have a token to score.

        Rows that have `input_ids` are taken as they are; without `labels` all of their tokens are scored.
        """
        numbered = rows.remove_columns([name for name in RESERVED_COLUMNS if name in rows.column_names])
        text = Dataset.map if len(numbered) else (lambda data, *args, **kwargs: data)
        return text(
            numbered,
            lambda row, number: self.row(row, formatting_func) | {SAMPLE_ID: number},
            with_indices=True,
            remove_columns=numbered.column_names,
            desc="Tokenising rows",
        ).filter(_has_scored, input_columns="labels", desc="Dropping rows without a token to score")

    def row(
        self, row: Mapping[str, Any], formatting_func: Callable[[dict[str, Any]], str] | None = None
    ) -> dict[str, list[int]]:
        """`input_ids` and `labels` (-100: not scored) of one row."""
        row = dict(row)
        if "input_ids" in row:
            ids = list(row["input_ids"])
            labels = list(row["labels"]) if row.get("labels") is not None else self._masked(ids, row)
        else:
            if formatting_func is not None:
                row = {self.text_field: formatting_func(row)}
            row = dict(maybe_convert_to_chatml(row))
            # With `role` and `content` already, TRL leaves their column's name as it is.
            ids, labels = self._text(row | {"messages": row["conversations"]} if "conversations" in row else row)
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

    def _text(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        masks: dict[str, Sequence[int]] = {}
        if is_conversational(row):
            settings = self._template_settings(row)
            asked = row.get("prompt")
            turns = row["messages"] if asked is None else [*asked, *row["completion"]]
            whole = self._chat(turns, return_assistant_tokens_mask=self.assistant_only, **settings)
            ids = whole["input_ids"]
            if "assistant_masks" in whole:
                masks["assistant_masks"] = whole["assistant_masks"]
            prompt = [] if asked is None else self._chat(asked, add_generation_prompt=True, **settings)["input_ids"]
        else:
            end = self.tokenizer.eos_token or ""
            text = row[self.text_field] if "completion" not in row else row["completion"]
            text = text if text.endswith(end) else text + end
            asked = row.get("prompt") if "completion" in row else None
            ids = self.tokenizer(text=(asked or "") + text)["input_ids"]
            prompt = [] if asked is None else self.tokenizer(text=asked)["input_ids"]
        if asked is not None:
            # The answer starts where the tokens of the prompt and of the whole part, not always after the prompt.
            start = next((n for n, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), None)
            start = min(len(prompt), len(ids)) if start is None else start
            masks["completion_mask"] = [0] * start + [1] * (len(ids) - start)
        return list(ids), self._masked(ids, masks)

    def _chat(self, turns: Sequence[Any], **settings: Any) -> Any:
        return self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **settings)

    def _template_settings(self, row: Mapping[str, Any]) -> dict[str, Any]:
        tools = row.get("tools")
        settings = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        return settings | dict(self.template or {}) | dict(row.get("chat_template_kwargs") or {})

    def _masked(self, ids: Sequence[int], masks: Mapping[str, Any]) -> list[int]:
        names = [*(["completion_mask"] if self.completion_only else []), "assistant_masks"]
        known = [masks[name] for name in names if masks.get(name) is not None]
        return [token if all(marks) else IGNORED for token, *marks in zip(ids, *known, strict=False)]


def _has_scored(labels: list[int]) -> bool:
    """True if a causal model scores a token of the row: a label after the first position."""
    return any(label != IGNORED for label in labels[1:])
