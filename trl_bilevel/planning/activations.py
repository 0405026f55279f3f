"""Bytes that forward and backward hold: saved activations of a decoder layer, working space, the fused LM head.

The formulas follow what the eager code of transformers' Llama family saves for the backward; docs/planning.md derives
them term by term. `n` is the number of tokens of a micro-batch.
"""

from __future__ import annotations

from collections import defaultdict

from .shapes import Linear, ModelShape, RunShape

# Layers that read the input of attention, and which layer's input another one reads, too: it is saved once.
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
READ_WITH = dict.fromkeys(ATTENTION_INPUTS, "q_proj") | {"up_proj": "gate_proj"}
# Tokens of a tile of TRL's fused LM head.
TILE_TOKENS = 4096
# Bytes per entry of a tile that it holds beside the tile, without Triton: forward, backward.
TILE_FORWARD, TILE_BACKWARD = 13, 29
FLOAT = 4


def compute_bytes(model: ModelShape, run: RunShape) -> int:
    """Bytes per value that the linear layers compute with; quantised ones use the model's own dtype."""
    return 2 if run.autocast and run.quantisation is None else model.weight_bytes


def _adapter_compute(model: ModelShape, run: RunShape) -> int:
    return 2 if run.autocast else model.adapter_bytes


def layer_saved(model: ModelShape, run: RunShape, n: int) -> int:
    """Bytes that one decoder layer saves for its backward, its input among them."""
    own, k = model.weight_bytes, compute_bytes(model, run)
    width, kv_width = model.heads * model.head_size, model.key_value_heads * model.head_size
    normed = 2 * model.hidden + (width + kv_width if model.head_norms else 0)
    # Queries, keys, values, output; keys and values are repeated for all heads where a mask or `eager` asks it.
    repeated = run.attention == "eager" or (run.attention == "sdpa" and run.padded)
    # Norms compute in fp32; the input is saved as such, and the normalised values if the norm's weight is trained.
    saved = n * normed * (FLOAT + (own if model.norms_trained else 0))
    saved += n * k * 2 * (width + (width if repeated else kv_width))
    if run.attention == "eager":
        # Softmax in fp32, and its result in the compute dtype.
        saved += n * run.tokens * model.heads * (FLOAT if k == FLOAT else FLOAT + k)
    else:
        saved += n * model.heads * FLOAT  # log-sum-exp
    saved += 3 * n * _intermediate(model) * k  # gate, its activation, and what it is multiplied by
    saved += _inputs(model, run, n, k)
    if run.autocast and own == FLOAT and run.quantisation is None:
        # The cast weights, which the backward needs.
        saved += 2 * sum(layer.inputs * layer.outputs for layer in model.linears)
    return saved + n * _adapter_compute(model, run) * sum(layer.rank for layer in model.linears)


def _inputs(model: ModelShape, run: RunShape, n: int, k: int) -> int:
    """Inputs that weight gradients need: of trained layers and of adapters."""
    groups: dict[str, list[Linear]] = defaultdict(list)
    for layer in model.linears:
        groups[READ_WITH.get(layer.name, layer.name)].append(layer)
    wanted = _adapter_compute(model, run)
    saved = 0
    for name, group in groups.items():
        # Norms give the model's dtype, the other layers that of compute.
        source = k if name in ("o_proj", "down_proj") else model.weight_bytes
        # PEFT casts to the adapter's fp32, and autocast back: a copy of its own, although the dtypes agree.
        twice = run.autocast and run.quantisation is None and model.adapter_bytes != source
        shared = False
        for layer in group:
            kept = 0
            if layer.trained and source != k:
                kept += k  # autocast casts for every layer anew
            if layer.rank and run.dropout > 0:
                kept += wanted + _mask_bytes(model, run, source)
            elif layer.rank and (wanted != source or twice):
                kept += wanted
            elif layer.rank:
                shared = True
            shared |= layer.trained and source == k
            saved += n * layer.inputs * kept
        # What attention has saved already is not counted twice.
        if shared and name != "o_proj":
            saved += n * group[0].inputs * source
    return saved


def _mask_bytes(model: ModelShape, run: RunShape, source: int) -> int:
    """Bytes per value of an adapter's dropout mask."""
    if run.device == "cuda":
        return 1
    return source if run.quantisation is not None and run.autocast else model.adapter_bytes


def _intermediate(model: ModelShape) -> int:
    """Width of the feed-forward part: what its last layer reads."""
    widths = [layer.inputs for layer in model.linears if layer.name not in (*ATTENTION_INPUTS, "o_proj")]
    return max(widths, default=4 * model.hidden)


def layer_input(model: ModelShape, n: int) -> int:
    """Bytes of a decoder layer's input: all that checkpointing keeps of it."""
    return n * model.hidden * model.weight_bytes


def layer_working(model: ModelShape, run: RunShape, n: int) -> int:
    """Bytes that a layer's backward needs beside what was saved: gradients on their way, dequantised weights."""
    k = compute_bytes(model, run)
    feed = 2 * n * model.hidden * model.weight_bytes + 2 * n * _intermediate(model) * k
    if model.adapted and not run.autocast and model.adapter_bytes > k:
        feed += n * _intermediate(model) * model.adapter_bytes
    attention = 2 * n * run.tokens * model.heads * FLOAT if run.attention == "eager" else 0
    largest = max((layer.inputs * layer.outputs for layer in model.linears), default=0)
    return max(feed, attention) + (largest * k if run.quantisation is not None else 0)


def layer_forward(model: ModelShape, run: RunShape, n: int) -> int:
    """Bytes that a layer's forward needs where nothing is saved."""
    mlp = 3 * n * _intermediate(model) * compute_bytes(model, run) + 2 * n * model.hidden * model.weight_bytes
    return max(mlp, 3 * n * run.tokens * model.heads * FLOAT) if run.attention == "eager" else mlp


def head_saved(model: ModelShape, n: int) -> int:
    """Final norm, and the states that the LM head reads."""
    norm = FLOAT + (model.weight_bytes if model.norms_trained else 0)
    return n * model.hidden * (norm + 2 * model.weight_bytes)


def head_is_trained(model: ModelShape) -> bool:
    """True if the LM head's weight gets a gradient, its own or as the embedding."""
    return model.head_trained or (model.tied and model.embedding_trained)


def head_forward(model: ModelShape, run: RunShape, n: int) -> int:
    """Working space of the fused LM head's forward: one tile, never the logits of all tokens."""
    return _tile(model, run, n, TILE_FORWARD)


def head_backward(model: ModelShape, run: RunShape, n: int) -> int:
    """The same of its backward: a tile, the states' gradient in fp32, and the weight's if the head is trained."""
    trained = model.vocabulary * model.hidden * FLOAT if head_is_trained(model) else 0
    return _tile(model, run, n, TILE_BACKWARD) + n * model.hidden * FLOAT + trained


def _tile(model: ModelShape, run: RunShape, n: int, beside: int) -> int:
    k = 2 if run.autocast else model.weight_bytes
    tokens, width = min(n, TILE_TOKENS), min(model.vocabulary, run.tile_width)
    space = tokens * run.tile_width * k
    if run.autocast and model.weight_bytes == FLOAT:
        space += width * model.hidden * k
    return space if run.device == "cuda" else space + tokens * width * beside


def positions_working(model: ModelShape, run: RunShape, positions: int) -> int:
    """Working space of whole logits of a few positions: these, in fp32 too, log-probabilities, their gradient."""
    k = 2 if run.autocast else model.weight_bytes
    return positions * model.vocabulary * (k + (2 if k == FLOAT else 3) * FLOAT)
