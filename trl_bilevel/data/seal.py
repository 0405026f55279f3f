"""SEAL's data selector (arXiv 2410.07471): one logit per row, in the rows' order, in a file of its own.

What SEAL's code does (github.com/hanshen95/SEAL, `train_sft_selector.py` and `models/actor.py`): it saves its
parameter of logits, float32 `[N]`, as `NAME_ACTIVATION.pt` by `torch.save`; the weight of a row is
`N softmax(logits)` or `2 sigmoid(logits)`; `train_sft.py` loads the file and trains on the rows of the highest logits.

`.pt` files are pickles. They are read with `weights_only=True`, which runs no code of theirs. SEAL's own code reads
nothing else, so a name that ends in `.pt` gets one, with that single tensor in it; `.npy` and `.safetensors` hold the
same logits without pickle.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .files import atomically

TENSOR = "logits"
READERS = {
    ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True),
    ".npy": lambda path: torch.from_numpy(np.load(path, allow_pickle=False)),
    ".safetensors": lambda path: load_file(path)[TENSOR],
}
# They are handed open files: by name, numpy would add an ending of its own.
WRITERS = {
    ".pt": lambda file, values: torch.save(torch.nn.Parameter(values), file),
    ".npy": lambda file, values: np.save(file, values.numpy(), allow_pickle=False),
    ".safetensors": lambda file, values: file.write(save({TENSOR: values})),
}
# A weight of zero has no finite logit: this one gives less than 1e-30 of the best row's weight.
LOWEST = -80.0


def read_selector(path: str | Path) -> Tensor:
    """Logits of a selector file, float32 `[N]` on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or code.
    """
    path = _known(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no selector file {path}.")
    try:
        logits = READERS[path.suffix](path)
    except (ValueError, TypeError, KeyError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} holds no selector that can be read without running code of the file: {type(error).__name__}."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 1 or len(logits) == 0 or not logits.is_floating_point():
        found = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{path} holds {found}: a selector is one tensor of floats, a logit per row.")
    logits = logits.detach().float()
    if bool((logits.isnan() | logits.isposinf()).any()):
        raise ValueError(f"{path} holds logits that are NaN or infinite.")
    if bool(logits.isneginf().all()):
        raise ValueError(f"{path} gives no row a weight: all logits are minus infinity.")
    return logits


def write_selector(path: str | Path, logits: Tensor) -> None:
    """Write logits `[N]` as float32, atomically: `.pt` as SEAL does, `.safetensors` with one tensor, `logits`.

    Raises:
        ValueError: if the name ends otherwise.
    """
    path = _known(path)

    def write(target: Path) -> None:
        with target.open("wb") as file:
            WRITERS[path.suffix](file, logits.detach().float().cpu().contiguous())

    atomically(path, write)


def _known(path: str | Path) -> Path:
    if Path(path).suffix not in READERS:
        raise ValueError(f"Selectors are files that end in {', '.join(READERS)}, got {str(path)!r}.")
    return Path(path)


def selector_weights(logits: Tensor, activation: str = "softmax") -> Tensor:
    """Weights float32 `[N]` as SEAL computes them: `N softmax(logits)`, or with `"sigmoid"` `2 sigmoid(logits)`."""
    wide = logits.double()
    return (2 * wide.sigmoid() if activation == "sigmoid" else len(logits) * wide.softmax(0)).float()


def selector_logits(weights: Tensor, activation: str = "softmax") -> Tensor:
    """Logits float32 `[N]` whose `selector_weights` are in proportion to `weights`; with softmax, equal at mean one.

    Args:
        weights (`Tensor` float `[N]`): at least 0; NaN (rows never trained on) counts as 0, which becomes a logit of
            about -80.
        activation (`str`): with `"sigmoid"` the largest weight gets a logit of 0, since a weight has an upper limit.

    Raises:
        ValueError: if weights are negative or infinite, or none is above 0.
    """
    known = torch.nan_to_num(weights.double(), nan=0.0, posinf=-1.0)
    if bool((known < 0).any()) or float(known.sum()) <= 0:
        raise ValueError("A selector needs finite weights of at least 0, and not 0 for all rows.")
    logits = (0.5 * known / known.max()).logit() if activation == "sigmoid" else (known / known.mean()).log()
    return logits.clamp(min=LOWEST).float()


def activation_of(path: str | Path) -> str | None:
    """The activation that SEAL puts at the end of a selector's name; of an epoch's file before `_epN`."""
    found = re.search(r"(softmax|sigmoid)(_ep\d+)?$", Path(path).stem)
    return found and found[1]
