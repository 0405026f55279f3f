"""Models under evaluation: loading, losses of rows, responses."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..core.scores import row_losses
from ..data.formats import Part
from .rows import Row, Tokens, digest, encode, render

_THOUGHT = re.compile(r"^.*?</think>", re.DOTALL)


@dataclass
class Settings:
    """How models are loaded and asked; the same for all models of a comparison.

    Parameters:
        load (`dict`): keyword arguments of `from_pretrained` (dtype, quantisation, revision ...).
        template (`dict`): further arguments of the chat template.
        batch_size (`int`): rows at a time.
        max_length (`int`): tokens of a row that are read.
        max_new_tokens (`int`): of a response.
        temperature (`float`): 0 for greedy responses.
        seed (`int`): of sampled responses.
        progress (`bool`): show progress bars.
    """

    load: dict[str, Any]
    template: Mapping[str, Any]
    batch_size: int = 8
    max_length: int = 2048
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    progress: bool = False

    def bar(self, items: Iterable[Any], what: str) -> Any:
        """A progress bar over batches, on the error stream."""
        return tqdm(items, desc=what, disable=not self.progress, leave=False)


@dataclass
class Losses:
    """Losses of rows under one model, in the order of the rows.

    Attributes:
        sums (`float64 [n]`): summed loss of the scored tokens, in nats.
        counts (`float64 [n]`): scored tokens; 0 if a row has none within `max_length`.
        sizes (`float64 [n]`): bytes of the scored text in UTF-8: what models of different tokenizers share.
        tokens (`str`): a digest of the tokens; equal for models that read the rows alike.
        cut (`int`): rows longer than `max_length`.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    sizes: NDArray[np.float64]
    tokens: str
    cut: int


def load_model(name: str, load: Mapping[str, Any]) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer; on the GPU if there is one.

    Args:
        name (`str`): hub name or folder of a model, or folder of a PEFT adapter.
        load (`dict`): keyword arguments of `from_pretrained`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..data.models import is_adapter

    adapter = is_adapter(name)
    loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    revision = {"revision": load["revision"]} if load.get("revision") else {}
    try:
        model = loader.from_pretrained(name, **{"device_map": device(), **load})
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"Could not load the model {name!r}: {error} Give a hub name, a folder of a model, or a folder of a PEFT "
            "adapter."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **revision)
    except (OSError, ValueError):
        if not adapter:
            raise
        # Adapters are saved without a tokenizer, too.
        tokenizer = AutoTokenizer.from_pretrained(PeftConfig.from_pretrained(name).base_model_name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def device() -> str:
    """Where models go."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free() -> None:
    """Give the memory of a deleted model back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def losses(model: Any, tokenizer: Any, rows: Sequence[Row], settings: Settings, what: str = "Losses") -> Losses:
    """Losses of the rows' answers; of rows of plain text, of all tokens but the first."""
    tokens = [encode(row, tokenizer, settings.template, settings.max_length + 1) for row in rows]
    cut = sum(len(row.ids) > settings.max_length for row in tokens)
    tokens = [Tokens(row.ids[: settings.max_length], row.start) for row in tokens]
    sums, counts = np.zeros(len(tokens)), np.zeros(len(tokens))
    scored = [number for number, row in enumerate(tokens) if len(row.ids) > max(row.start, 1)]
    # Longest first: what does not fit into memory fails at once. Similar lengths together need little padding.
    scored.sort(key=lambda number: -len(tokens[number].ids))
    for start in settings.bar(range(0, len(scored), settings.batch_size), what):
        numbers = scored[start : start + settings.batch_size]
        batch = _pad([tokens[number] for number in numbers], tokenizer.pad_token_id or 0)
        found = _forward(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        sums[numbers], counts[numbers] = found.sums.double().cpu(), found.counts.double().cpu()
    sizes = [len(tokenizer.decode(row.ids[max(row.start, 1) :], skip_special_tokens=True).encode()) for row in tokens]
    return Losses(sums, counts, np.array(sizes, dtype=np.float64), digest([[t.ids, t.start] for t in tokens]), cut)


def _pad(tokens: Sequence[Tokens], value: int) -> dict[str, Tensor]:
    length = max(len(row.ids) for row in tokens)
    ids = torch.full((len(tokens), length), value)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, row in enumerate(tokens):
        count = len(row.ids)
        ids[number, :count], mask[number, :count] = torch.tensor(row.ids), 1
        labels[number, row.start : count] = ids[number, row.start : count]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _forward(model: Any, batch: dict[str, Tensor]) -> Any:
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    scored = labels != -100
    log_probs = torch.zeros(labels.shape, device=labels.device)
    # Only scored positions in fp32: all of them would not fit where the vocabulary is large.
    log_probs[scored] = -torch.nn.functional.cross_entropy(logits[scored].float(), labels[scored], reduction="none")
    return row_losses(log_probs, scored)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    batch_size: int = 20,
    temperature: float = 0.0,
    special_tokens: bool = True,
    bar: Any = None,
) -> list[str]:
    """Responses to prompts that carry their own template, in the order given.

    Args:
        new_tokens (`int`): at most so many per response.
        batch_size (`int`): prompts at a time.
        temperature (`float`): 0 for greedy ones; else sampled, from the whole distribution.
        special_tokens (`bool`): let the tokenizer add its own.
        bar: wraps the iteration over batches.
    """
    model.eval()
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    starts: Iterable[int] = range(0, len(prompts), batch_size)
    out: list[str] = []
    for start in bar(starts) if bar else starts:
        texts = list(prompts[start : start + batch_size])
        settings = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
        batch = tokenizer(texts, add_special_tokens=special_tokens, **settings).to(model.device)
        tokens: Tensor = model.generate(
            **batch, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
        out += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


def responses(
    model: Any, tokenizer: Any, prompts: Sequence[Part], settings: Settings, what: str = "Responses"
) -> list[str]:
    """The model's responses to prompts, in their order, without the thoughts that a reasoning model writes first."""
    texts = [render(prompt, tokenizer, settings.template) for prompt in prompts]
    chats = bool(prompts) and not isinstance(prompts[0], str)
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    torch.manual_seed(settings.seed)
    found = generate(
        model,
        tokenizer,
        [texts[number] for number in order],
        settings.max_new_tokens,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        # A chat template writes them itself.
        special_tokens=not chats,
        bar=lambda starts: settings.bar(starts, what),
    )
    out = [""] * len(texts)
    for number, text in zip(order, found, strict=True):
        out[number] = _THOUGHT.sub("", text).strip()
    return out
