"""A scorer that lasts: what was learned about rows, kept in a small folder, for rows that come later."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from .._version import __version__
from ..core.probe import Scorer
from ..data.files import atomically, write_json
from ..data.identity import DATA_WEIGHT, fingerprint
from ..data.models import load_model
from ..data.rows import Rows, padded, plain_rows
from ..data.tokens import Tokeniser
from .language_model import LanguageModel, left_as_it_was, model_hash
from .processes import Processes
from .progress import Progress, tokens_of
from .reading import BATCH_ROWS, BATCH_TOKENS, mean_states, of_columns
from .result import RowWeights
from .settings import PROBE_DEPTH

logger = logging.getLogger(__name__)

SCORER_FILE, FACTS_FILE = "scorer.safetensors", "scorer.json"
# Of these files; raised when older code could not read them any more.
FORMAT = 1
# Share of the rows that may lie as far out as one in a hundred of the scorer's own does.
USUAL_SHARE = 0.1


@dataclass
class RowScorer:
    """Weighs rows by the measure of an earlier choice, in one partial forward each.

    Attributes:
        scorer (`Scorer`): weights from hidden states.
        facts (`dict`): the model's name, revision and hash, how rows are read, what the scorer was made from.

    Example:

    ```python
    weights = learn_weights(model, mixed, trusted)
    weights.scorer.save("scorer")
    tomorrow = RowScorer.load("scorer").weigh(new_rows).to_dataset()
    ```
    """

    scorer: Scorer
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        self._ready: tuple[LanguageModel, Tokeniser, Any] | None = None

    def save(self, folder: str | Path) -> None:
        """Write `scorer.safetensors` and `scorer.json` into a folder; no text of a row, and nothing that is run."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in self.scorer.tensors().items()}
        atomically(path / SCORER_FILE, lambda file: save_file(tensors, file))
        write_json(path / FACTS_FILE, {"format": FORMAT, "facts": self.facts})

    @classmethod
    def load(cls, folder: str | Path) -> RowScorer:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if the folder holds no scorer.
            ValueError: if it is damaged, or of another version.
        """
        path = Path(folder)
        if not (path / SCORER_FILE).is_file() or not (path / FACTS_FILE).is_file():
            raise FileNotFoundError(f"{path} has no scorer ({SCORER_FILE}, {FACTS_FILE}).")
        try:
            told = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']!r}, this version reads {FORMAT}")
            return cls(Scorer.from_tensors(load_file(path / SCORER_FILE)), told["facts"])
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"The scorer in {path} cannot be read ({error}). Make it again.") from error

    def use(self, model: Any = None, processing_class: Any = None, bf16: bool | None = None, **kwargs: Any) -> None:
        """Take a model; by default the one that the scorer was made with is loaded by its name.

        Args:
            model (*optional*): a causal language model, with the same weights.
            processing_class (*optional*): its tokenizer; by default the model's.
            bf16 (`bool`, *optional*): compute in bfloat16 under autocast; by default as when it was made.
            kwargs: for loading the model by name (`dtype`, `device_map`, `quantization_config`, `trust_remote_code`).

        Raises:
            ValueError: if it is another model.
        """
        told, name = self.facts["read"], self.facts["model_name"]
        if model is None:
            revision = {"revision": self.facts["revision"]} if self.facts["revision"] else {}
            model = load_model(name, **({"dtype": getattr(torch, self.facts["dtype"])} | revision | kwargs))
        if model_hash(model) != self.facts["model_hash"]:
            raise ValueError(
                f"The scorer was made with {name!r}, and the model given has other weights. Give that model, in the "
                f"same dtype ({self.facts['dtype']}), or learn weights anew."
            )
        if processing_class is None:
            remote = bool(kwargs.get("trust_remote_code", False))
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=remote)
        pad = processing_class.pad_token_id
        collate = padded(processing_class.eos_token_id if pad is None else pad)
        reader = LanguageModel(model, self.facts["bf16"] if bf16 is None else bf16)
        self._ready = reader, Tokeniser(processing_class, **told), collate

    def weigh(self, rows: Dataset, disable_tqdm: bool = False) -> RowWeights:
        """Weights of other rows, by the measure of the rows that the scorer was made from.

        A weight of 1 is what those rows weigh on average, so the mean of these may be another one: tomorrow's rows may
        be better. Processes that `accelerate launch` or `torchrun` started share the work, and each returns all
        weights. Memory is 12 bytes per row.

        Args:
            rows ([`~datasets.Dataset`]): in the format of the rows that the scorer was made from.
            disable_tqdm (`bool`): draw no progress bar.
        """
        start = time.perf_counter()
        reader, read, collate = self._read()
        prepared = plain_rows(read.prepare(rows), collate, len(rows))
        processes = Processes.now()
        found = torch.zeros(len(rows), 3)
        with left_as_it_was(reader.model), Progress(disable_tqdm or processes.rank > 0) as progress:
            tokens = sum(prepared.lengths)
            progress.plan(PROBE_DEPTH * tokens, max(1, tokens), 0)
            progress.set_description("Weighing rows")
            for batch in processes.own(prepared.batches(range(len(prepared)), BATCH_TOKENS, BATCH_ROWS)):
                found[prepared.ids[batch]] = self._of(reader, prepared.batch(batch))
                progress.done(PROBE_DEPTH * tokens_of(prepared.lengths, batch) * processes.count)
        found = torch.where(prepared.kept.unsqueeze(1), processes.sum(found), torch.nan)
        far = self._tell(found[prepared.kept, 2], prepared)
        facts = self.facts | {"rows": len(rows), "rows_kept": len(prepared), "fingerprint": fingerprint(rows)}
        facts |= {"far_share": round(far, 4), "seconds": round(time.perf_counter() - start, 2)}
        return RowWeights(found[:, 0].contiguous(), found[:, 1].contiguous(), facts, rows)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of rows with their weights (`data_weight`), for `datasets.map(batched=True)` or Ray's `map_batches`.

        Args:
            batch: columns of rows, as lists or arrays. Rows without a token to score get NaN.
        """
        reader, read, collate = self._read()
        columns = {name: [_plain(value) for value in values] for name, values in batch.items()}
        with left_as_it_was(reader.model):
            weights = of_columns(columns, read.row, collate, lambda rows: self._of(reader, rows)[:, 0])
        return dict(batch) | {DATA_WEIGHT: weights.numpy()}

    def _read(self) -> tuple[LanguageModel, Tokeniser, Any]:
        if self._ready is None:
            self.use()
        assert self._ready is not None
        return self._ready

    def _of(self, reader: LanguageModel, batch: Mapping[str, Any]) -> Tensor:
        """Weight, score and distance of the rows of a batch, float32 `[b, 3]`."""
        states, probe = mean_states(reader, batch, PROBE_DEPTH), self.scorer.probe
        return torch.stack([self.scorer(states), probe(states), probe.distance(states)], dim=-1)

    def _tell(self, distances: Tensor, rows: Rows) -> float:
        """The share of rows that are unlike what the scorer was made from; a warning if that is many."""
        share = float((distances > self.facts["far"]).float().mean()) if len(rows) else 0.0
        if share > USUAL_SHARE:
            logger.warning(
                f"{share:.0%} of {len(rows)} rows are unlike the rows that the scorer was made from (there: 1%), so "
                "their weights mean little. Learn weights anew, from rows like these."
            )
        return share


def _plain(value: Any) -> Any:
    """A value of a row as Python has it: Ray makes arrays of lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def make_scorer(choice: Any, reader: LanguageModel, name: str, read: Tokeniser) -> RowScorer | None:
    """The scorer of a choice; None of a pilot, which does not score rows as they come."""
    if choice.scorer is None:
        return None
    own = ("max_length", "text_field", "completion_only", "assistant_only", "template")
    facts = {
        "model_name": name,
        "revision": getattr(reader.model.config, "_commit_hash", None),
        "model_hash": model_hash(reader.model),
        "dtype": str(next(reader.model.parameters()).dtype).removeprefix("torch."),
        "bf16": reader.bf16,
        "read": {each: getattr(read, each) for each in own},
        "version": __version__,
        **{each: choice.facts[each] for each in ("far", "likeness_auc", "likeness_weight", "match_weight")},
    }
    return RowScorer(choice.scorer, facts)
