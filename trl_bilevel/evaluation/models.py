"""Models under evaluation: loading, losses of rows, responses; and all that is measured of one while it is loaded."""

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..data.answers import STUB, TEST_REFUSAL
from ..data.files import json_object
from ..data.formats import Part, turns
from ..data.models import is_adapter
from ..data.models import load_model as load_weights
from ..data.rows import pad_rows
from .refusal import COMPLIANCE, NEITHER, REFUSAL, RefusalJudge, outcomes_of
from .rows import Row, digest, encode, question, render, row_of

_THOUGHT = re.compile(r"^.*?</think>", re.DOTALL)


@dataclass
class Settings:
    """How models are asked, the same for all models of a comparison. The help of each field says what it is."""

    max_length: int = field(default=2048, metadata={"help": "Tokens of a row that are read."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of a response."})
    batch_size: int = field(default=8, metadata={"help": "Rows at a time."})
    temperature: float = field(default=0.0, metadata={"help": "Of responses; 0: greedy."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )
    seed: int = field(default=0, metadata={"help": "Of draws, sampled responses and intervals."})

    template: dict[str, Any] = field(init=False)  # of `chat_template_kwargs`

    def __post_init__(self) -> None:
        self.template = json_object(self.chat_template_kwargs, "chat_template_kwargs")


@dataclass
class Losses:
    """Losses of rows under one model, in the order of the rows."""

    sums: NDArray[np.float64]  # [n], summed loss of the scored tokens, in nats
    counts: NDArray[np.float64]  # [n], scored tokens; 0 if a row has none within `max_length`
    sizes: NDArray[np.float64]  # [n], bytes of the scored text in UTF-8: what models of different tokenizers share
    tokens: str  # a digest of the tokens; equal for models that read the rows alike
    cut: int  # rows longer than `max_length`


def load_model(name: str, load: Mapping[str, Any]) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer; `load` are keyword arguments of `from_pretrained`."""
    from transformers import AutoTokenizer

    try:
        model = load_weights(name, **{"device_map": device(), **load})
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Could not load the model {name!r}: {error} Give a hub name, a folder of a model, or a folder of a PEFT "
            "adapter."
        ) from error
    # Adapters are saved without a tokenizer, too.
    bare = is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file()
    source = model.active_peft_config.base_model_name_or_path if bare else name
    tokenizer = AutoTokenizer.from_pretrained(source, revision=(not bare and load.get("revision")) or "main")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.eval(), tokenizer


def device() -> str:
    """Where models go."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free() -> None:
    """Give the memory of a deleted model back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_batches(items: Sequence[Any], settings: Settings, what: str) -> Iterator[Any]:
    """Batches of `settings.batch_size` items, with a progress bar on a terminal."""
    for start in tqdm(range(0, len(items), settings.batch_size), desc=what, disable=None, leave=False):
        yield items[start : start + settings.batch_size]


@torch.no_grad()
def losses(model: Any, tokenizer: Any, rows: Sequence[Row], settings: Settings, what: str = "Losses") -> Losses:
    """Losses of the rows' answers; of rows of plain text, of all tokens but the first."""
    whole = [encode(row, tokenizer, settings.template) for row in rows]
    tokens = [{name: part[: settings.max_length] for name, part in row.items()} for row in whole]
    scored = [np.array(row["labels"][1:]) != -100 for row in tokens]
    counts = np.array([places.sum() for places in scored], dtype=np.float64)
    texts = [np.array(row["input_ids"][1:])[places] for row, places in zip(tokens, scored, strict=True)]
    sizes = [len(tokenizer.decode(text, skip_special_tokens=True).encode()) for text in texts]
    sums = np.zeros(len(rows))
    # Longest first: what does not fit into memory fails at once. Similar lengths together need little padding.
    order = sorted(np.flatnonzero(counts), key=lambda number: -len(tokens[number]["input_ids"]))
    for numbers in in_batches(order, settings, what):
        batch = pad_rows([tokens[number] for number in numbers], tokenizer.pad_token_id or 0)
        labels = batch.pop("labels")[:, 1:].to(model.device)
        logits = model(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False).logits[:, :-1]
        found = torch.zeros(labels.shape, device=labels.device)
        # Only scored positions in fp32: all of them would not fit where the vocabulary is large.
        places = labels != -100
        found[places] = torch.nn.functional.cross_entropy(logits[places].float(), labels[places], reduction="none")
        sums[numbers] = found.sum(-1).double().cpu()
    cut = sum(len(row["input_ids"]) > settings.max_length for row in whole)
    return Losses(sums, counts, np.array(sizes, dtype=np.float64), digest(tokens), cut)


@torch.no_grad()
def responses(
    model: Any, tokenizer: Any, prompts: Sequence[Part], settings: Settings, what: str = "Responses"
) -> list[str]:
    """The model's responses to prompts, in their order, without the thoughts that a reasoning model writes first.

    Prompts of plain text are asked as they are. Sampling is from the whole distribution.
    """
    texts = [render(prompt, tokenizer, settings.template) for prompt in prompts]
    # A chat template writes the special tokens itself.
    special = all(isinstance(prompt, str) for prompt in prompts)
    reading = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": special}
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0}
        torch.manual_seed(settings.seed)
    model.eval()
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    out = [""] * len(texts)
    for numbers in in_batches(order, settings, what):
        batch = tokenizer([texts[number] for number in numbers], **reading).to(model.device)
        tokens = model.generate(
            **batch, max_new_tokens=settings.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
        said = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for number, text in zip(numbers, said, strict=True):
            out[number] = _THOUGHT.sub("", text).strip()
    return out


@dataclass
class Work:
    """What to measure."""

    rows: Sequence[Row]
    refusals: RefusalJudge
    asked: Sequence[int] = ()  # numbers of the rows whose prompts are answered, too
    requests: Mapping[str, Sequence[Part]] = field(default_factory=dict)  # "harmful" and "benign" ones; both or none


@dataclass
class Measured:
    """Everything that was measured of one model; what `Work` does not ask for is empty."""

    name: str
    losses: Losses
    # To "rows" and "benign" requests. Responses to harmful ones are judged and dropped.
    responses: dict[str, list[str]] = field(default_factory=dict)
    # Of the response to each "harmful" and "benign" request: 1 refusal, 0 compliance, -1 neither.
    outcomes: dict[str, list[int]] = field(default_factory=dict)
    # Of each harmful request: whether a refusal is likelier per token than a compliance stub, whatever the model says.
    preferred: list[bool] = field(default_factory=list)


def measure(name: str, work: Work, settings: Settings, load: Mapping[str, Any]) -> Measured:
    """Load a model (`load`: arguments of `from_pretrained`), measure it, and free its memory."""
    model, tokenizer = load_model(name, load)
    out = Measured(name, losses(model, tokenizer, work.rows, settings))
    prompts = [work.rows[number].prompt for number in work.asked]
    out.responses["rows"] = responses(model, tokenizer, prompts, settings)
    for kind, texts in work.requests.items():
        requests = [question(text, tokenizer) for text in texts]
        said = responses(model, tokenizer, requests, settings, f"{kind.capitalize()} requests")
        out.outcomes[kind] = outcomes_of(work.refusals, [turns(text) for text in requests], said)
        if kind == "benign":
            out.responses[kind] = said
        else:
            refused, complied = (
                losses(model, tokenizer, [row_of(text, answer) for text in requests], settings, "Stubs")
                for answer in (TEST_REFUSAL, STUB)
            )
            if not (refused.counts * complied.counts).all():
                limit = f"`max_length={settings.max_length}`"
                raise ValueError(f"A harmful request leaves no room for an answer within {limit}. Raise it.")
            out.preferred = (refused.sums / refused.counts < complied.sums / complied.counts).tolist()
    del model
    free()
    return out


def shown_responses(work: Work, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Prompts and responses for a file; of harmful requests, only whether they were refused, or a stub."""
    stubs = {REFUSAL: "[refused]", COMPLIANCE: STUB, NEITHER: ""}
    prompts = {"rows": [work.rows[number].prompt for number in work.asked]} | dict(work.requests)
    out = [{"set": kind, "prompt": turns(prompt)} for kind, asked in prompts.items() for prompt in asked]
    for who, one in zip(("model", "baseline"), measured, strict=False):
        said = one.responses | {"harmful": [stubs[outcome] for outcome in one.outcomes.get("harmful", [])]}
        out = [line | {who: text} for line, text in zip(out, [t for kind in prompts for t in said[kind]], strict=True)]
    return out
