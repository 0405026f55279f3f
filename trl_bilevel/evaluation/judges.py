"""Judges that score one response at a time: a reward model, and stand-ins for where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..data.assets import minilm_folder
from ..data.formats import turns
from . import models
from .preference import FIRST, SECOND, UNDECIDED, PairwiseJudge, ask_both_orders
from .refusal import load_object
from .rows import Row, question, row_of

KINDS = "reward:NAME, embedding, loss:NAME or PACKAGE.MODULE:OBJECT"


class Scorer(Protocol):
    """Scores responses one by one, so that order plays no role.

    Attributes:
        note (`str`): what the scores are, for every output.
        stand_in (`bool`): whether they merely stand in for a judgement of quality.
    """

    note: str
    stand_in: bool

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """A score per response `[n]`, larger is better; the rows hold the prompts and the reference answers."""
        ...


class RewardModel:
    """Scores of a reward model: `AutoModelForSequenceClassification` with one output.

    Args:
        name (`str`): hub name or folder.
        settings (`Settings`): batch size, longest input, progress.

    Raises:
        ValueError: if it cannot be loaded, or has more than one output.
    """

    stand_in = False

    def __init__(self, name: str, settings: models.Settings):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        _reward_config(name)
        self.note = f"reward model {name}"
        self.settings = settings
        self.model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype="auto", device_map=models.device()
        ).eval()
        # Of a text that is too long, the end holds the response.
        self.tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """The model's output for each prompt with its response `[n]`."""
        chats = bool(self.tokenizer.chat_template)
        texts: list[Any] = [(turns(row.prompt), response) for row, response in zip(rows, responses, strict=True)]
        if chats:
            written = [[*row.prompt, *row.completion] for row in _written(rows, responses, self.tokenizer)]
            texts = [self.tokenizer.apply_chat_template(chat, tokenize=False) for chat in written]
        limit = min(self.settings.max_length, self.tokenizer.model_max_length)

        def forward(batch: list[Any]) -> torch.Tensor:
            inputs = [batch] if chats else [list(part) for part in zip(*batch, strict=True)]
            settings = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
            tokens = self.tokenizer(*inputs, add_special_tokens=not chats, **settings)
            return self.model(**tokens.to(self.model.device)).logits[:, 0]

        return _in_batches(forward, texts, self.settings)


class EmbeddingSimilarity:
    """Stand-in for a judge: cosine similarity of a response to the row's reference answer, by sentence embeddings.

    Args:
        folder (`str`): hub name or folder of an encoder whose embeddings are means over tokens.
        settings (`Settings`): batch size, progress.
    """

    stand_in = True

    def __init__(self, folder: str, settings: models.Settings, name: str | None = None):
        from transformers import AutoModel, AutoTokenizer

        self.note = f"stand-in, no judge of quality: embedding similarity to the reference ({name or folder})"
        self.settings = settings
        self.model = AutoModel.from_pretrained(folder, device_map=models.device()).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """Cosine similarity `[n]` of each response to its row's reference, in [-1, 1]."""
        texts = [*responses, *(turns(row.completion) for row in rows)]
        vectors = np.array(_in_batches(self._embed, texts, self.settings)).reshape(2, len(rows), -1)
        return [float(value) for value in (vectors[0] * vectors[1]).sum(-1)]

    def _embed(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=256)
        tokens = tokens.to(self.model.device)
        states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


class ModelLoss:
    """Stand-in for a judge: the likelihood of a response under a given model, per token; an empty one scores least.

    Args:
        name (`str`): hub name or folder of the model, or folder of an adapter.
        settings (`Settings`): loading, batch size, progress.
    """

    stand_in = True

    def __init__(self, name: str, settings: models.Settings):
        self.note = f"stand-in, no judge of quality: likelihood under {name}"
        self.settings = settings
        self.model, self.tokenizer = models.load_model(name, settings.load)

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """Minus the mean loss per token `[n]`, in nats."""
        written = _written(rows, responses, self.tokenizer)
        found = models.losses(self.model, self.tokenizer, written, self.settings, "Judging")
        means = found.sums / np.maximum(found.counts, 1)
        return [-float(mean) if text else -float("inf") for mean, text in zip(means, responses, strict=True)]


SCORERS = (RewardModel, EmbeddingSimilarity, ModelLoss)


def verdicts(
    judge: PairwiseJudge | Scorer, rows: Sequence[Row], model: Sequence[str], baseline: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Verdicts in both orders (see `ask_both_orders`); a scorer, blind to order, scores each response once.

    The response of the higher score is the better one; equal scores are undecided.
    """
    if not isinstance(judge, SCORERS):
        return ask_both_orders(judge, [turns(row.prompt) for row in rows], model, baseline)  # type: ignore[arg-type]
    pairs = list(zip(judge.score(rows, model), judge.score(rows, baseline), strict=True))
    forward = [UNDECIDED if a == b else FIRST if a > b else SECOND for a, b in pairs]
    return forward, [{FIRST: SECOND, SECOND: FIRST, UNDECIDED: UNDECIDED}[verdict] for verdict in forward]


def load_judge(name: str, settings: models.Settings) -> PairwiseJudge | Scorer:
    """A judge from the command line.

    Args:
        name (`str`): `"reward:NAME"` (a reward model on the hub or in a folder), `"embedding"` or `"embedding:NAME"`
            (similarity to the reference; MiniLM-L6 fetched from a package by default), `"loss:NAME"` (likelihood under
            a model), or `"PACKAGE.MODULE:OBJECT"` (a `PairwiseJudge`).
        settings (`Settings`): of the evaluation.

    Raises:
        ValueError: if there is no such judge.
    """
    check_judge(name)
    kind, _, rest = name.partition(":")
    if kind == "embedding":
        folder, shown = (rest, rest) if rest else (str(minilm_folder()), "MiniLM-L6-v2")
        return EmbeddingSimilarity(folder, settings, shown)
    if kind in ("reward", "loss"):
        return RewardModel(rest, settings) if kind == "reward" else ModelLoss(rest, settings)
    return load_object(name, "judge")  # type: ignore[return-value]


def check_judge(name: str) -> None:
    """Find what is wrong with a judge before the models are run; arguments and errors as for `load_judge`."""
    kind, _, rest = name.partition(":")
    if name == "embedding":
        minilm_folder()
    elif not rest:
        raise ValueError(f"Unknown judge {name!r}; known: {KINDS}.")
    elif kind == "reward":
        _reward_config(rest)
    elif kind not in ("embedding", "loss"):
        load_object(name, "judge")


def _reward_config(name: str) -> None:
    from transformers import AutoConfig

    try:
        outputs = AutoConfig.from_pretrained(name).num_labels
    except (OSError, ValueError) as error:
        raise ValueError(f"Could not load the reward model {name!r}: {error}") from error
    if outputs != 1:
        raise ValueError(
            f"The reward model {name!r} has {outputs} outputs, not one: it is a classifier of another kind."
        )


def _written(rows: Sequence[Row], responses: Sequence[str], tokenizer: Any) -> list[Row]:
    """The rows' prompts with the responses, as a model of this tokenizer reads them."""
    return [row_of(question(row.prompt, tokenizer), text) for row, text in zip(rows, responses, strict=True)]


def _in_batches(
    function: Callable[[list[Any]], torch.Tensor], items: Sequence[Any], settings: models.Settings
) -> list[Any]:
    out: list[Any] = []
    with torch.no_grad():
        for start in settings.bar(range(0, len(items), settings.batch_size), "Judging"):
            out += function(list(items[start : start + settings.batch_size])).float().cpu().tolist()
    return out
