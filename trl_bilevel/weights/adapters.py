"""The pilot's own low-rank adapters: beside the model, not in it.

Two thin matrices for every linear layer of the upper layers, whose product is added to the layer's output by a hook.
The model itself is never changed: whatever it trains (all of it, an adapter, 4-bit weights beneath one), choosing does
the same, and leaves no trace. Gradients end below the lowest adapter.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import linear

# Rank and scale, and the share of the layers that are adapted, from the top: as in all measurements (docs/results.md).
RANK, SCALE, UPPER = 8, 2.0, 1 / 3
LEAST_LAYERS = 2


class Adapter:
    """Low-rank updates of the linear layers in the upper part of a decoder's layers, which are given from below.

    The first matrices are drawn by `seed`; the second ones are zero, so that a new adapter has no effect.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], seed: int):
        self.sites = adapted_modules(layers)
        self.lowest = layers[len(layers) - upper_layers(len(layers))]
        self.values: list[torch.nn.Parameter] = []
        for name, module in self.sites:
            inner, outer = widths(module)
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            bound = 1 / math.sqrt(inner)
            first = torch.empty(RANK, inner).uniform_(-bound, bound, generator=generator)
            device = next(module.parameters()).device
            self.values += [torch.nn.Parameter(part.to(device)) for part in (first, torch.zeros(outer, RANK))]

    @contextmanager
    def added(self) -> Iterator[None]:
        """Within, the model computes with the adapter."""
        with ExitStack() as hooks:
            for (_, module), first, second in zip(self.sites, self.values[::2], self.values[1::2], strict=True):
                hooks.enter_context(module.register_forward_hook(self._hook(first, second)))
            # With an adapter and gradient checkpointing, transformers has the embeddings' output require a gradient.
            hooks.enter_context(self.lowest.register_forward_pre_hook(_detached, with_kwargs=True))
            yield

    @staticmethod
    def _hook(first: Tensor, second: Tensor) -> Any:
        def add(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # float16 would lose small gradients: there is no loss scaling here.
            dtype = torch.float32 if output.dtype == torch.float16 else output.dtype
            low = linear(args[0].to(dtype), first.to(dtype))
            return output + (SCALE * linear(low, second.to(dtype))).to(output.dtype)

        return add

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All values, float32 on the CPU, by name."""
        return {f"{prefix}.{n}": value.detach().cpu().contiguous() for n, value in enumerate(self.values)}

    @torch.no_grad()
    def load_tensors(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        for n, value in enumerate(self.values):
            value.copy_(tensors[f"{prefix}.{n}"])


def _detached(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hidden states come as the first argument, or by name."""

    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def upper_layers(count: int) -> int:
    """How many of so many layers are adapted, from the top."""
    return min(count, max(LEAST_LAYERS, math.ceil(UPPER * count)))


def adapted_modules(layers: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """The linear layers of the upper layers, by names that are the same with and without an adapter of the caller's.

    If there is none, that is a `ValueError`.
    """
    found: list[tuple[str, torch.nn.Module]] = []
    for number in range(len(layers) - upper_layers(len(layers)), len(layers)):
        inside: tuple[str, ...] = ()
        for path, module in layers[number].named_modules():
            # What belongs to an adapter of the caller's is part of the layer that it adapts.
            if (inside and path.startswith(inside)) or widths(module) == (0, 0):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{path}.",)
            found.append((f"{number}.{path.replace('.base_layer', '')}", module))
    if not found:
        raise ValueError(
            f"The layers ({type(layers[0]).__name__}) have no linear layer that the pilot could adapt. Give the "
            "weights in a column `data_weight`, learned with another model."
        )
    return found


def widths(module: torch.nn.Module) -> tuple[int, int]:
    """Numbers of a linear layer's inputs and outputs; (0, 0) for other modules."""
    for inner, outer in (("in_features", "out_features"), ("nx", "nf")):
        if isinstance(getattr(module, inner, None), int) and isinstance(getattr(module, outer, None), int):
            return getattr(module, inner), getattr(module, outer)
    return 0, 0
