"""What a model is asked: rows with their tokens as TRL's SFT makes them, and harmful and benign requests."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.assets import harmful_requests
from ..data.formats import Part, answered, assistant, user
from ..data.loading import load_rows
from ..data.tokens import Tokeniser

PROMPT_COLUMNS = ("prompt", "question", "instruction", "goal", "behavior", "request", "text")
# What sets that mix both kinds call them, in a column `label`.
LABELS = {"harmful": "unsafe", "benign": "safe"}


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


def requests(kind: str, name: str, split: str = "train") -> list[Part]:
    """Requests of a published set or of yours.

    Args:
        kind (`str`): `"harmful"`, or `"benign"` for requests that look harmful.
        name (`str`): `"harmbench"` (200 harmful ones, fetched and checked by hash), `"lookalikes"` (60 benign ones,
            ours), a text file with a request per line, or anything `load_rows` takes, with a column of
            `PROMPT_COLUMNS` or `messages`; of sets labelled by `LABELS`, the other kind is left out.
    """
    if (kind, name) == ("harmful", "harmbench"):
        return list(harmful_requests())
    if (kind, name) == ("benign", "lookalikes"):
        found = _lines((Path(__file__).parent / "text" / "lookalikes.txt").read_text())
    elif Path(name).suffix == ".txt":
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file {name} of {kind} requests.")
        found = _lines(Path(name).read_text())
    else:
        found = prompts_of(load_rows(name, split=split), name, LABELS[kind])
    if not found:
        raise ValueError(f"{name!r} holds no {kind} request.")
    return found


def prompts_of(rows: Iterable[Mapping[str, Any]], name: str, label: str) -> list[Part]:
    """The rows' requests, of one label where they are labelled; of chats, all but the answers."""
    rows = list(rows)
    columns = set(rows[0]) if rows else set()
    if {row.get("label") for row in rows} & {*LABELS.values()}:
        rows = [row for row in rows if row["label"] == label]
    column = next((column for column in PROMPT_COLUMNS if column in columns), None)
    if column is not None:
        return [row[column] for row in rows]
    if "messages" in columns:
        return [[turn for turn in row["messages"] if turn["role"] != "assistant"] for row in rows]
    raise ValueError(
        f"{name!r} has the columns {sorted(columns)}, none of which is known to hold requests: "
        f"{', '.join(PROMPT_COLUMNS)} or messages. Rename the column."
    )


def _lines(text: str) -> list[Part]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
