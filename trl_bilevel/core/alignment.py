"""Inner products of per-row gradients with a fixed direction, from what a backward pass holds anyway.

For a linear layer `y_t = W a_t` with output gradients `b_t` the gradient of `W` is `sum_t b_t a_t^T`, so its inner
product with a direction `U` is `sum_t b_t^T U a_t`: one thin product per token, no gradient per row. Summed over the
tokens of a row it belongs to that row alone, since no other row's loss reaches its tokens.

All functions compute in float32 (float64 for float64 inputs) unless said otherwise, and give that dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Up to this width the narrow side of a layer is an adapter's rank: products with it cost next to nothing in float32,
# and per-row gradients are small. Products of whole layers cost as much as the layer itself and stay in its dtype.
NARROW = 256


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or what the tensors promote to if that is wider."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def linear_products(inputs: Tensor, gradients: Tensor, direction: Tensor) -> Tensor:
    """`b_t^T U a_t` of every token, `[...]`.

    The product with `U` is taken on the side that leaves the narrower intermediate. Where both sides are wide, it is
    computed in the dtype of `gradients`: rounding errors of bf16 are independent over the millions of entries of `U`
    and cancel in the sum (about 1e-3 relative), while float32 products run at a fraction of the speed of bf16 ones.

    Args:
        inputs (`Tensor` `[..., i]`): what the layer was given, `a`.
        gradients (`Tensor` `[..., o]`): gradient of the loss by the layer's output, `b`.
        direction (`Tensor` `[o, i]`): `U`, in the place of the weight.
    """
    wide = working_dtype(inputs, gradients)
    dtype = wide if min(direction.shape) <= NARROW else gradients.dtype
    matrix = direction.to(dtype)
    if direction.shape[0] <= direction.shape[1]:
        return ((inputs.to(dtype) @ matrix.T).to(wide) * gradients.to(wide)).sum(-1)
    return ((gradients.to(dtype) @ matrix).to(wide) * inputs.to(wide)).sum(-1)


def bias_products(gradients: Tensor, direction: Tensor) -> Tensor:
    """`b_t^T u` of every token, `[...]`, for a bias: `gradients` `[..., o]`, `direction` `[o]`."""
    dtype = working_dtype(gradients)
    return gradients.to(dtype) @ direction.to(dtype)


def embedding_products(ids: Tensor, gradients: Tensor, direction: Tensor, padding_idx: int | None = None) -> Tensor:
    """`b_t^T U[id_t]` of every token, `[...]`, for an embedding.

    Args:
        ids (`Tensor` int `[...]`), gradients (`Tensor` `[..., d]`), direction (`Tensor` `[V, d]`).
        padding_idx (`int`, *optional*): the id that gets no gradient, as in `torch.nn.Embedding`.
    """
    dtype = working_dtype(gradients)
    products = (gradients.to(dtype) * direction[ids].to(dtype)).sum(-1)
    return products if padding_idx is None else products.masked_fill(ids == padding_idx, 0.0)


def sum_rows(tokens: Tensor, rows: int) -> Tensor:
    """Sums over the tokens of each row, `[rows]`.

    Args:
        tokens (`Tensor` `[rows, ...]`, or `[rows * S]` with the rows one after the other).
    """
    return tokens.reshape(rows, -1).sum(-1)


def sum_segments(tokens: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums over the tokens of each packed segment, `[count]`.

    Args:
        tokens (`Tensor`): one value per token, in the order of `segments`.
        segments (`Tensor` int64): the segment of each token, below `count`; negative for padding, which is left out.
    """
    index = segments.flatten()
    values = tokens.flatten()
    # Padding goes into a bin of its own: picking tokens by a mask would wait for the device.
    sums = torch.zeros(count + 1, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, torch.where(index < 0, count, index), values)[:count]


def linear_square_norms(inputs: Tensor, gradients: Tensor) -> Tensor:
    """`|sum_t b_t a_t^T|^2` of every row, `[R]`: the squared norm of the row's gradient of the weight.

    By the row's gradient itself (transient, `R o i` numbers) if it is small; else by Gram matrices of the tokens
    (`2 R T^2` numbers, the "ghost norm" of arXiv 2110.05679).

    Args:
        inputs (`Tensor` `[R, T, i]`), gradients (`Tensor` `[R, T, o]`).
    """
    dtype = working_dtype(inputs, gradients)
    a, b = inputs.to(dtype), gradients.to(dtype)
    narrow, size = min(a.shape[-1], b.shape[-1]), a.shape[-1] * b.shape[-1]
    if narrow <= NARROW or size <= a.shape[1] ** 2:
        return (b.transpose(1, 2) @ a).square().sum((1, 2))
    return ((a @ a.transpose(1, 2)) * (b @ b.transpose(1, 2))).sum((1, 2))


def bias_square_norms(gradients: Tensor) -> Tensor:
    """`|sum_t b_t|^2` of every row, `[R]`, for `gradients` `[R, T, o]`."""
    return gradients.to(working_dtype(gradients)).sum(1).square().sum(-1)


def embedding_square_norms(ids: Tensor, gradients: Tensor, padding_idx: int | None = None) -> Tensor:
    """Squared norm of every row's gradient of an embedding, `[R]`: tokens of the same id share a vector.

    Args:
        ids (`Tensor` int `[R, T]`), gradients (`Tensor` `[R, T, d]`).
        padding_idx (`int`, *optional*): the id that gets no gradient.
    """
    b = gradients.to(working_dtype(gradients))
    if padding_idx is not None:
        b = b.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
    same = ids.unsqueeze(1) == ids.unsqueeze(2)
    return ((b @ b.transpose(1, 2)) * same).sum((1, 2))


def preconditioned(gradient: Tensor, second_moment: Tensor, step: Tensor, beta: float, eps: float) -> Tensor:
    """`g / (sqrt(v) + eps)`: the direction that an Adam step would take, without momentum.

    `v` is the optimizer's second moment as its next step would have it after `g`, bias-corrected. Without `g` in it, a
    parameter that training has never reached (`v = 0`: the embedding of a token that only validation rows hold) would
    get `g / eps` and outweigh all others.

    Args:
        gradient (`Tensor` float32): `g`.
        second_moment (`Tensor`): Adam's `exp_avg_sq`, of the same shape.
        step (`Tensor` `[]`): optimizer steps done.
        beta (`float`): Adam's `beta2`.
        eps (`float`): Adam's `eps`.
    """
    moment = beta * second_moment.to(gradient.dtype) + (1 - beta) * gradient.square()
    correction = 1 - beta ** (step.to(device=gradient.device, dtype=gradient.dtype) + 1)
    return gradient / ((moment / correction).sqrt() + eps)


def unit_length(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, scaled such that all of them together have Euclidean length 1; zeros stay zeros."""
    total = torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()
    return [tensor / total.clamp(min=torch.finfo(total.dtype).tiny) for tensor in tensors]
