"""Taps: inner products of per-row gradients with a direction, read off an ordinary backward pass.

A tap stands on the output of a layer. Going forward it hands the output on and lets autograd keep the layer's input
(which autograd keeps anyway, for the gradient of the weight); going backward it sees the gradient of the output, and
adds what each row contributes to a small tensor. It saves through autograd, so gradient checkpointing drops and
recomputes what it holds like everything else, and each use of a layer counts exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import alignment as core


class RowSink:
    """What the taps found of the rows of one backward.

    Args:
        rows (`int`): number of rows (or of packed segments).
        device: where the sums live.
        segments (`Tensor` int64 `[B, S]`, *optional*): segment of each token, negative for padding; without it, rows
            are the first dimension of what layers are given.
        norms (`bool`, defaults to `False`): also take each row's own gradient norm.

    Attributes:
        products (`Tensor` float32 `[rows]`): `<c_i grad L_i, U>`, `L_i` the row's summed loss and `c_i` what the
            backward multiplied it with.
        square_norms (`Tensor` float32 `[rows]`, *optional*): `|c_i grad L_i|^2` over the tapped parameters.
        factors (`Tensor` float32 `[rows]`, *optional*): `c_i n_i`, `n_i` the row's scored tokens; see `attach`.
        called (`set[str]`): names of the tapped layers that took part.
    """

    def __init__(self, rows: int, device: torch.device, segments: Tensor | None = None, norms: bool = False):
        self.rows = rows
        self.segments = segments
        self.products = torch.zeros(rows, device=device)
        self.square_norms = torch.zeros(rows, device=device) if norms else None
        self.factors: Tensor | None = None
        self.called: set[str] = set()
        self._seen: set[int] = set()

    def attach(self, log_probs: Tensor, scored: Tensor) -> None:
        """Between forward and backward: learn what the backward multiplies each row's loss with.

        It is read off the gradient of the log-probabilities, so that weights, token counts, accumulation, number of
        processes and loss scaling cancel, whatever they are.

        Args:
            log_probs (`Tensor` `[B, S - 1]`): log-probability of each token after the first, as the loss is computed
                from it (with one factor per row).
            scored (`Tensor` bool `[B, S - 1]`): true where the loss counts it. Ignored log-probabilities are constant
                zeros, but have a gradient all the same.
        """
        self.factors = torch.zeros_like(self.products)

        def read(gradient: Tensor) -> None:
            assert self.factors is not None
            self.factors += self._sum(-gradient.to(self.factors) * scored, shift=1)

        log_probs.register_hook(read)

    def add(self, tokens: Tensor) -> None:
        """Take in one value per token."""
        self.products += self._sum(tokens.to(self.products.device))

    def add_square_norms(self, place: Place, values: Tensor) -> None:
        """Take in the squared norms `[rows]` of one layer's gradients."""
        assert self.square_norms is not None
        if id(place) in self._seen:
            raise ValueError(
                f"The layer {place.name!r} is used several times in a forward, so the norms of the rows' gradients do "
                "not add up. Unset `normalise` (`alignment_normalise`)."
            )
        self._seen.add(id(place))
        self.square_norms += values.to(self.square_norms)

    def _sum(self, tokens: Tensor, shift: int = 0) -> Tensor:
        if self.segments is None:
            return core.sum_rows(tokens, self.rows)
        return core.sum_segments(tokens, self.segments[:, shift:], self.rows)

    def scores(self) -> Tensor:
        """After the backward: `<grad ell_i, U>` of each row, `[rows]` float32, `ell_i` its mean loss per token.

        Divided by `|grad ell_i|` if norms were asked for. NaN for a row that the backward multiplied by zero (it has
        no gradient to look at), infinite for one whose gradient is not finite. Without `attach`, the products as
        they are.
        """
        if self.square_norms is None:
            found = self.products if self.factors is None else self.products / self.factors
        else:
            found = self.products / self.square_norms.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        found = found.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return found if self.factors is None else torch.where(self.factors == 0, torch.nan, found)


@dataclass(eq=False)
class Place:
    """A layer whose parameters are tapped.

    Attributes:
        name (`str`): of the layer in the model.
        layer (`nn.Linear` or `nn.Embedding`).
        weight, bias (`int`, *optional*): where these parameters stand in the direction, `None` if they are not tapped.
    """

    name: str
    layer: nn.Linear | nn.Embedding
    weight: int | None = None
    bias: int | None = None

    def read(self, sink: RowSink, direction: Sequence[Tensor], inputs: Tensor, gradients: Tensor) -> None:
        """Add what the rows contribute. `inputs` `[..., i]` (or ids `[...]`), `gradients` `[..., o]`."""
        layer = self.layer
        by_row = (sink.rows, -1, gradients.shape[-1])
        norms: list[Tensor] = []
        if self.weight is not None:
            matrix = direction[self.weight]
            if isinstance(layer, nn.Embedding):
                sink.add(core.embedding_products(inputs, gradients, matrix, layer.padding_idx))
            else:
                sink.add(core.linear_products(inputs, gradients, matrix))
            if sink.square_norms is not None and isinstance(layer, nn.Embedding):
                ids = inputs.reshape(sink.rows, -1)
                norms.append(core.embedding_square_norms(ids, gradients.reshape(by_row), layer.padding_idx))
            elif sink.square_norms is not None:
                rows = inputs.reshape(sink.rows, -1, inputs.shape[-1])
                norms.append(core.linear_square_norms(rows, gradients.reshape(by_row)))
        if self.bias is not None:
            sink.add(core.bias_products(gradients, direction[self.bias]))
            if sink.square_norms is not None:
                norms.append(core.bias_square_norms(gradients.reshape(by_row)))
        if norms:
            sink.add_square_norms(self, torch.stack(norms).sum(0))

    def check_rows(self, sink: RowSink, output: Tensor) -> None:
        """Refuse outputs whose tokens cannot be told apart by row."""
        leading = output.shape[:-1]
        if sink.segments is not None:
            fits = leading.numel() == sink.segments.numel()
        else:
            fits = leading[:1] == (sink.rows,) or (len(leading) == 1 and leading.numel() % sink.rows == 0)
        if not fits:
            raise ValueError(
                f"The layer {self.name!r} gives {tuple(output.shape)} for {sink.rows} rows, so its gradient cannot be "
                "told apart by row (mixture-of-experts layers regroup tokens). Use `weight_estimator='lookahead'` or "
                "'value_function'."
            )


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, place: Place, sink: RowSink, direction: Any) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.place, ctx.sink, ctx.direction = place, sink, direction
        # Not `view_as`: autograd refuses in-place operations on a view that was made in here.
        return output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inputs,) = ctx.saved_tensors
        # Recomputation for gradient checkpointing may run within autocast, which would round the products.
        with torch.autocast(gradients.device.type, enabled=False):
            ctx.place.read(ctx.sink, ctx.direction, inputs, gradients)
        return gradients, None, None, None, None


class GradientTaps:
    """Reads `<grad of each row, direction>` off the backward passes of a model.

    Tapped are the trainable parameters of `nn.Linear` (LoRA's `lora_A` and `lora_B` among them, also on 4-bit bases)
    and `nn.Embedding`. All others are left out of the direction: parameters of other layers (norms), layers in `skip`,
    parameters that a layer outside of these holds too (tied embeddings).

    Args:
        model (`nn.Module`): whose backward passes are read.
        skip (iterable of `nn.Module`): layers not to tap, since the model uses their parameters without calling them
            (`untappable_layers` for TRL's language models).

    Attributes:
        parameters (`list[nn.Parameter]`): tapped parameters, in the model's order; the direction has their shapes.
        left_out (`list[str]`): names of the trainable parameters that are not tapped.
        direction (`list[Tensor]`, *optional*): float32 `U`, one tensor per parameter.

    Raises:
        ValueError: if no trainable parameter can be tapped; after the first backward, if one has a gradient though its
            layer was not called.
    """

    def __init__(self, model: nn.Module, skip: Iterable[nn.Module] = ()):
        skipped = {id(layer) for layer in skip}
        holders: dict[int, list[nn.Module]] = {}
        for layer in model.modules():
            for parameter in layer.parameters(recurse=False):
                holders.setdefault(id(parameter), []).append(layer)
        self.parameters: list[nn.Parameter] = []
        self.left_out: list[str] = []
        index: dict[int, int] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if all(id(layer) not in skipped and _is_tappable(layer) for layer in holders[id(parameter)]):
                index[id(parameter)] = len(self.parameters)
                self.parameters.append(parameter)
            else:
                self.left_out.append(name)
        if not self.parameters:
            raise ValueError(
                "`weight_estimator='alignment'` reads gradients of linear and embedding layers, and none of the "
                f"trainable parameters belongs to one that it can read: {self.left_out[:8]}. Train others too, or use "
                "`weight_estimator='lookahead'` or 'value_function'."
            )
        self.places: list[Place] = []
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                bias = layer.bias if isinstance(layer, nn.Linear) else None
                place = Place(name, layer, index.get(id(layer.weight)), index.get(id(bias)))
                if place.weight is not None or place.bias is not None:
                    self.places.append(place)
        self.direction: list[Tensor] | None = None
        self._checked = False

    @contextmanager
    def watch(self, rows: int, *, segments: Tensor | None = None, norms: bool = False) -> Iterator[RowSink]:
        """A context around forward and backward of one batch; the sink holds the sums once the backward is done.

        Args:
            rows (`int`): rows of the batch, or number of packed segments.
            segments (`Tensor` int64 `[B, S]`, *optional*): segment of each token of packed rows, negative for padding.
            norms (`bool`, defaults to `False`): also take the norm of each row's own gradient.
        """
        if self.direction is None:
            raise RuntimeError("`GradientTaps.direction` must be set before a backward can be read.")
        if norms and segments is not None:
            raise ValueError("`norms` of packed segments are not supported: give one row per sequence.")
        sink = RowSink(rows, self.parameters[0].device, segments, norms)
        unchecked = not self._checked and all(parameter.grad is None for parameter in self.parameters)
        handles = [
            place.layer.register_forward_hook(self._hook(place, sink, self.direction), with_kwargs=True)
            for place in self.places
        ]
        try:
            # Hooks stay until the backward is done: recomputation runs the forward, and the taps, again.
            yield sink
        finally:
            for handle in handles:
                handle.remove()
        if unchecked:
            self._checked = True
            self._check_called(sink)

    def _check_called(self, sink: RowSink) -> None:
        """Once, after a backward: refuse a gradient that came by another way than a call of its layer."""
        for place in self.places:
            own = [self.parameters[i] for i in (place.weight, place.bias) if i is not None]
            if place.name not in sink.called and any(p.grad is not None and bool(p.grad.any()) for p in own):
                raise ValueError(
                    f"The parameters of {place.name!r} have a gradient, but the layer was not called: the model uses "
                    "them in another way, and the rows' gradients cannot be read off it. Use "
                    "`weight_estimator='lookahead'` or 'value_function'."
                )

    @staticmethod
    def _hook(place: Place, sink: RowSink, direction: list[Tensor]) -> Any:
        def tap(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return None
            place.check_rows(sink, output)
            sink.called.add(place.name)
            inputs = args[0] if args else kwargs["input"]
            # A bias needs no input; nothing is kept for it.
            kept = inputs.detach() if place.weight is not None else output.new_empty(0)
            return _Tap.apply(output, kept, place, sink, direction)

        return tap


def _is_tappable(layer: nn.Module) -> bool:
    """True for linear and embedding layers whose forward is PyTorch's own: the formulas hold for no other."""
    forward = type(layer).forward
    if isinstance(layer, nn.Embedding):
        plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        return plain and forward is nn.Embedding.forward
    return isinstance(layer, nn.Linear) and forward is nn.Linear.forward


def untappable_layers(model: Any) -> list[nn.Module]:
    """Layers of a transformers or PEFT language model that must not be tapped.

    The LM head, which TRL's fused head reads without calling it, and embeddings of anything but tokens (positions are
    looked up once for all rows).
    """
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    of_tokens = {id(layer) for layer in tokens.modules()}
    layers = [] if head is None else list(head.modules())
    return layers + [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in of_tokens]
