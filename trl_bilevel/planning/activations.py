"""Bytes that forward and backward hold: saved activations of a decoder layer, working space, the fused LM head.

The formulas follow what the eager code of transformers' Llama family saves for the backward; docs/planning.md derives
them term by term. `n` is the number of tokens of a micro-batch.
"""

from __future__ import annotations

from .shapes import Linear, ModelShape, RunShape

# Layers that read one and the same tensor, so that it is saved once.
READ_TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
# Tokens of a tile of TRL's fused LM head.
TILE_TOKENS = 4096
# Bytes per entry of a tile that it holds beside the tile, without Triton: forward, backward.
TILE_FORWARD, TILE_BACKWARD = 13, 29
FLOAT = 4


def compute_bytes(model: ModelShape, run: RunShape) -> int:
    """Bytes per value that the linear layers compute with; quantised ones use the model's own dtype."""
    return 2 if run.autocast and run.quantisation is None else model.weight_bytes


def layer_saved(model: ModelShape, run: RunShape, n: int) -> int:
    """Bytes that one decoder layer saves for its backward, its input among them."""
    own, k = model.weight_bytes, compute_bytes(model, run)
    width, kv_width = model.heads * model.head_size, model.key_value_heads * model.head_size
    # Norms compute in fp32; the input is saved as such, and the normalised values if the norm's weight is trained.
    norm = FLOAT + (own if model.norms_trained else 0)
    saved = 2 * n * model.hidden * norm
    if model.head_norms:
        saved += n * (width + kv_width) * norm
    saved += _attention(model, run, n, k, width, kv_width)
    saved += 3 * n * _intermediate(model) * k  # gate, its activation, and what it is multiplied by
    saved += _inputs(model, run, n, k)
    for layer in model.linears:
        if run.autocast and own == FLOAT and run.quantisation is None:
            saved += 2 * layer.inputs * layer.outputs  # the cast weight, which the backward needs
        if layer.rank:
            saved += n * layer.rank * _adapter_compute(model, run)
    return saved


def _attention(model: ModelShape, run: RunShape, n: int, k: int, width: int, kv_width: int) -> int:
    """Queries, keys, values, output; keys and values are repeated for all heads where a mask or `eager` asks it."""
    repeated = run.padded or run.attention == "eager"
    if run.attention not in ("sdpa", "eager"):
        repeated = False
    saved = n * k * (2 * width + 2 * (width if repeated else kv_width))
    if run.attention == "eager":
        # Softmax in fp32, and its result in the compute dtype.
        pairs = n * run.tokens * model.heads
        return saved + pairs * (FLOAT if k == FLOAT else FLOAT + k)
    return saved + n * model.heads * FLOAT  # log-sum-exp


def _inputs(model: ModelShape, run: RunShape, n: int, k: int) -> int:
    """Inputs that weight gradients need: of trained layers and of adapters."""
    saved = 0
    for group in _groups(model.linears):
        source = _source_bytes(model, group[0], k)
        shared = False
        for layer in group:
            if layer.trained:
                # Autocast casts for every layer anew.
                if source == k:
                    shared = True
                else:
                    saved += n * layer.inputs * k
            if layer.rank:
                wanted = _adapter_compute(model, run)
                if run.dropout > 0:
                    mask = 1 if run.device == "cuda" else _dropout_bytes(model, run, source)
                    saved += n * layer.inputs * (wanted + mask)
                elif wanted == source and not _casts_through_float(model, run, source):
                    shared = True
                else:
                    saved += n * layer.inputs * wanted
        # What attention has saved already is not counted twice.
        if shared and group[0].name != "o_proj":
            saved += n * group[0].inputs * source
    return saved


def _groups(linears: tuple[Linear, ...]) -> list[list[Linear]]:
    groups: list[list[Linear]] = []
    for layer in linears:
        for group in groups:
            if any({layer.name, group[0].name} <= together for together in READ_TOGETHER):
                group.append(layer)
                break
        else:
            groups.append([layer])
    return groups


def _source_bytes(model: ModelShape, layer: Linear, k: int) -> int:
    """Bytes per value of the tensor that a layer reads: norms give the model's dtype, the others that of compute."""
    return k if layer.name in ("o_proj", "down_proj") else model.weight_bytes


def _adapter_compute(model: ModelShape, run: RunShape) -> int:
    return 2 if run.autocast else model.adapter_bytes


def _casts_through_float(model: ModelShape, run: RunShape, source: int) -> bool:
    """PEFT casts to the adapter's fp32, and autocast back: a copy of its own, although the dtypes agree."""
    return run.autocast and run.quantisation is None and model.adapter_bytes != source


def _dropout_bytes(model: ModelShape, run: RunShape, source: int) -> int:
    return source if run.quantisation is not None and run.autocast else model.adapter_bytes


def _intermediate(model: ModelShape) -> int:
    """Width of the feed-forward part: what its last layer reads."""
    widths = [layer.inputs for layer in model.linears if layer.name not in ("q_proj", "k_proj", "v_proj", "o_proj")]
    return max(widths, default=4 * model.hidden)


def layer_input(model: ModelShape, n: int) -> int:
    """Bytes of a decoder layer's input: all that checkpointing keeps of it."""
    return n * model.hidden * model.weight_bytes


def layer_working(model: ModelShape, run: RunShape, n: int) -> int:
    """Bytes that a layer's backward needs beside what was saved: gradients on their way, dequantised weights."""
    k = compute_bytes(model, run)
    largest = max((layer.inputs * layer.outputs for layer in model.linears), default=0)
    feed = 2 * n * model.hidden * model.weight_bytes + 2 * n * _intermediate(model) * k
    attention = 0
    if run.attention == "eager":
        attention = 2 * n * run.tokens * model.heads * FLOAT
    if model.adapted and not run.autocast and model.adapter_bytes > k:
        feed += n * _intermediate(model) * model.adapter_bytes
    dequantised = largest * k if run.quantisation is not None else 0
    return max(feed, attention) + dequantised


def layer_forward(model: ModelShape, run: RunShape, n: int) -> int:
    """Bytes that a layer's forward needs where nothing is saved."""
    k = compute_bytes(model, run)
    mlp = 3 * n * _intermediate(model) * k + 2 * n * model.hidden * model.weight_bytes
    if run.attention == "eager":
        return max(mlp, 3 * n * run.tokens * model.heads * FLOAT)
    return mlp


def head_saved(model: ModelShape, run: RunShape, n: int) -> int:
    """Final norm, and the states that the LM head reads."""
    norm = FLOAT + (model.weight_bytes if model.norms_trained else 0)
    return n * model.hidden * (norm + 2 * model.weight_bytes)


def head_forward(model: ModelShape, run: RunShape, n: int) -> int:
    """Working space of the fused LM head's forward: one tile, never the logits of all tokens."""
    k = 2 if run.autocast else model.weight_bytes
    tokens, width = min(n, TILE_TOKENS), min(model.vocabulary, run.tile_width)
    space = tokens * run.tile_width * k
    if run.autocast and model.weight_bytes == FLOAT:
        space += width * model.hidden * k
    return space if run.device == "cuda" else space + tokens * width * TILE_FORWARD


def head_backward(model: ModelShape, run: RunShape, n: int) -> int:
    """The same of its backward: a tile, the states' gradient in fp32, and the weight's if the head is trained."""
    k = 2 if run.autocast else model.weight_bytes
    tokens, width = min(n, TILE_TOKENS), min(model.vocabulary, run.tile_width)
    space = tokens * run.tile_width * k + n * model.hidden * FLOAT
    if run.autocast and model.weight_bytes == FLOAT:
        space += width * model.hidden * k
    if head_is_trained(model):
        space += model.vocabulary * model.hidden * FLOAT
    return space if run.device == "cuda" else space + tokens * width * TILE_BACKWARD


def head_is_trained(model: ModelShape) -> bool:
    """True if the LM head's weight gets a gradient, its own or as the embedding."""
    return model.head_trained or (model.tied and model.embedding_trained)
