"""The formats of a row: how its columns say what is asked and what is answered. Nothing else reads rows of texts.

| format | columns |
|---|---|
| pairs | `prompt` and `completion`, both text or both messages |
| messages | `messages`, each with `role` and `content` |
| conversations | `conversations`, each with `from` and `value` (or `role` and `content`) |
| instruction | `instruction`, `output`, and perhaps `input` |
| question | `question`, `response`, and perhaps `system_prompt` |
| text | the text field: all of it is scored |
| tokens | `input_ids`, and perhaps `labels`: prepared, its text is not known |

Of a row with several, the first in this list counts: a conversation is one row, its last message the answer.
"""

from collections.abc import Iterable, Mapping
from typing import Any

Turns = list[dict[str, Any]]
Part = str | Turns

PAIRS, MESSAGES, CONVERSATIONS, TEXT, TOKENS = "pairs", "messages", "conversations", "text", "tokens"
INSTRUCTION, QUESTION = "instruction", "question"
NEEDED = {
    PAIRS: {"prompt", "completion"},
    MESSAGES: {MESSAGES},
    CONVERSATIONS: {CONVERSATIONS},
    INSTRUCTION: {"instruction", "output"},
    QUESTION: {"question", "response"},
    TEXT: {"text"},
    TOKENS: {"input_ids"},
}
# What TRL's trainers take as it is; the others are read by evaluation and the demo.
TRAINABLE = (PAIRS, MESSAGES, CONVERSATIONS, TEXT, TOKENS)
FORMATS = (
    "`prompt` and `completion`, `messages`, `conversations`, `instruction` and `output`, `question` and `response`, "
    "or text"
)
# What sets that name their columns `from` and `value` call the two sides.
_ROLES = {"human": "user", "gpt": "assistant"}


def layout_of(columns: Any, text_field: str = "text") -> str | None:
    """Which format rows have, by the names of their columns: one of the table above, None if it is none.

    Args:
        columns: names, a row, or a dataset.
        text_field (`str`): the column of plain text.
    """
    names = set(getattr(columns, "column_names", None) or columns)
    needed = NEEDED | {TEXT: {text_field}}
    return next((layout for layout, wanted in needed.items() if wanted <= names), None)


def parts(row: Mapping[str, Any], text_field: str = "text", where: str = "A row") -> tuple[Part, Part]:
    """What is asked, and what should be answered: texts, or messages with `role` and `content`.

    A row of plain text asks nothing. A conversation's last message is its answer, whoever says it; of an empty one,
    both are empty. Where several formats are there and some are missing in this row, those that are filled count.

    Args:
        text_field (`str`): the column of plain text.
        where (`str`): the row's name in errors.

    Raises:
        ValueError: if the columns are those of no format with text.
    """
    filled = [name for name, value in row.items() if value is not None and not (isinstance(value, list) and not value)]
    layout = layout_of(filled, text_field)
    if layout in (None, TOKENS):
        layout = layout_of(row, text_field)
    if layout == PAIRS:
        return _part(row["prompt"]), _part(row["completion"])
    if layout in (MESSAGES, CONVERSATIONS):
        messages = _part(row[layout])
        return ("", messages) if isinstance(messages, str) else (messages[:-1], messages[-1:])
    if layout == INSTRUCTION:
        return user(f"{row['instruction']}\n{row.get('input') or ''}".strip()), assistant(row["output"])
    if layout == QUESTION:
        system = [{"role": "system", "content": row["system_prompt"]}] if row.get("system_prompt") else []
        return [*system, *user(row["question"])], assistant(row["response"])
    if layout == TEXT:
        return "", _part(row[text_field])
    raise ValueError(
        f"{where} has the columns {list(row)}, in which no text format is recognised. Known are {FORMATS}: rename the "
        "columns, or map the rows beforehand."
    )


def answered(row: Mapping[str, Any], text_field: str = "text", where: str = "A row") -> tuple[Part, Part]:
    """As `parts`, of a row whose answer is the assistant's.

    Raises:
        ValueError: as `parts`, and for a conversation that does not end with a message of the assistant.
    """
    asked, answer = parts(row, text_field, where)
    conversation = layout_of(row, text_field) in (MESSAGES, CONVERSATIONS)
    last = answer[-1] if answer else None
    if conversation and (not isinstance(last, Mapping) or last.get("role") != "assistant"):
        raise ValueError(f"{where} does not end with a message of the assistant: there is no answer in it.")
    return asked, answer


def question_and_answer(row: Mapping[str, Any], text_field: str = "text") -> tuple[str, str]:
    """What a row asks and what it answers, as text to be read; either may be empty. Any row will do."""
    try:
        asked, answer = parts(row, text_field)
    except ValueError:
        texts = [f"{name}: {value}" for name, value in row.items() if isinstance(value, str)]
        return "", "\n".join(texts) or "(no text in this row)"
    return turns(asked), content(answer)


def with_answer(value: Any, answer: str) -> Any:
    """A completion or a conversation with another last answer."""
    if isinstance(value, str):
        return answer
    last = value[-1]
    name = "value" if "value" in last and last.get("content") is None else "content"
    parted = isinstance(last.get(name), list)
    return [*value[:-1], {**last, name: [{"type": "text", "text": answer}] if parted else answer}]


def content(part: Any) -> str:
    """What a prompt, a completion or a message says, as text: contents may come in parts, roles are left out."""
    if part is None:
        return ""
    if isinstance(part, Mapping):
        found = next((part[name] for name in ("content", "value", "text") if part.get(name) is not None), None)
        return content(found)
    if isinstance(part, list | tuple):
        return "\n".join(text for text in map(content, part) if text)
    return str(part)


def turns(part: Any) -> str:
    """As `content`; of several messages, each with its role."""
    if isinstance(part, str) or part is None or len(part) == 1:
        return content(part)
    return "\n".join(f"{m.get('role', m.get('from', '?'))}: {content(m)}" for m in part if isinstance(m, Mapping))


def user(text: str) -> Turns:
    """A chat of one question."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> Turns:
    """The answer to it."""
    return [{"role": "assistant", "content": text}]


def _part(value: Any) -> Any:
    """A text, or messages with `role` and `content`; all else that a message holds stays."""
    if value is None:
        return ""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return str(value)
    return [_turn(message) if isinstance(message, Mapping) else message for message in value]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(message)
    for old, new in (("from", "role"), ("value", "content")):
        if old in out and out.get(new) is None:
            out[new] = out.pop(old)
    return out | {"role": _ROLES.get(out["role"], out["role"])} if "role" in out else out
