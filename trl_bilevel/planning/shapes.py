"""What the arithmetic needs to know of a model, which is not loaded, and of a run: plain numbers."""

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from ..weights.settings import PILOTS, PROBES

if TYPE_CHECKING:
    from ..trainer.bilevel_sft_config import BilevelSFTConfig

# What the hub says of well-known models, for when it cannot be reached.
KNOWN: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "text" / "models.yaml").read_text())


class Linear(NamedTuple):
    """A linear layer of every decoder layer."""

    name: str  # as in the model, `"q_proj"` say
    inputs: int
    outputs: int
    number: int  # how many of them the model has, one per decoder layer
    rank: int = 0  # of its LoRA adapter, 0 without one
    trained: bool = False  # whether its own weight is trained


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder model with the adapters it is trained with."""

    family: str  # `model_type` of its config
    vocabulary: int
    hidden: int
    intermediate: int  # width of the feed-forward part
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    linears: tuple[Linear, ...]  # of the decoder
    parameters: int  # of the base model, tied ones once, adapters not counted
    trainable: int  # trained parameters, adapters and modules to save counted
    trainable_bytes: int  # of these
    copied_bytes: int  # of trained copies of the base model's modules (`modules_to_save`), part of them
    adapter_bytes: int  # per value of the adapters, 0 without
    weight_bytes: int  # per value of the base model where it is not quantised
    head_trained: bool  # whether the LM head's weight gets a gradient, its own or as the embedding
    embedding_trained: bool
    norms_trained: bool
    head_norms: bool  # whether queries and keys are normalised per head (Qwen3)

    @property
    def linear_parameters(self) -> int:
        """Weights of the decoder's linear layers, which quantisation makes smaller."""
        return sum(layer.inputs * layer.outputs * layer.number for layer in self.linears)

    @property
    def adapter_parameters(self) -> int:
        """Parameters of the LoRA adapters."""
        return sum(layer.rank * (layer.inputs + layer.outputs) * layer.number for layer in self.linears)


@dataclass(frozen=True)
class RunShape:
    """The numbers of a run, on one device."""

    rows: int  # training rows of a micro-batch
    tokens: int  # of its longest row, prompt included
    mean_tokens: float | None = None  # of a row on average, for the work; `tokens` by default
    scored_tokens: float | None = None  # those of them that the loss counts; all but the first by default
    accumulation: int = 1  # micro-batches of an optimizer step
    processes: int = 1  # with their own device each (DDP)
    autocast: bool = False  # mixed precision (`bf16` or `fp16`)
    quantisation: str | None = None  # of the decoder's linear layers: "4bit", "4bit_nested" or "8bit"
    checkpointing: bool = True  # reentrant or not makes no difference here
    attention: str = "sdpa"  # or "eager", or another one that never holds the scores of all pairs
    padded: bool = True  # whether rows of a batch differ in length, so that attention needs a mask
    dropout: float = 0.0  # of the adapters
    optimizer: str = "adamw_torch_fused"  # `optim` as transformers names it
    device: str = "cuda"
    training_rows: int | None = None  # None if not known
    steps: int | None = None  # of the optimizer; None if not known
    validation_rows: int = 32  # trusted rows
    joined: int = 0  # trusted rows of an optimizer step, over all processes (`validation_loss_weight`)
    evaluation_rows: int = 8  # of a batch without gradient
    evaluates: bool = False  # whether such batches come in mid-training
    estimator: str = "none"  # `weight_estimator`, or the preset where weights move in training
    pilot_steps: int | None = None
    matches: bool = True  # whether the probe reads some rows with the answers of others, too
    trains: bool = True  # False for `trl-bilevel rank`
    tile_width: int = 32768  # entries of the vocabulary in a tile of TRL's fused LM head, a constant of TRL

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "accumulation", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    @property
    def pilots(self) -> bool:
        """True if a pilot run chooses the weights before the first step."""
        return self.estimator in PILOTS

    @property
    def casts(self) -> bool:
        """Whether the linear layers compute in another dtype than the model's."""
        return self.autocast and self.quantisation is None

    @property
    def probes(self) -> bool:
        """True if a probe reads all rows before the first step."""
        return self.estimator in PROBES

    @property
    def rows_per_step(self) -> int:
        """Training rows of an optimizer step, over all processes."""
        return self.rows * self.accumulation * self.processes


def run_shape(args: "BilevelSFTConfig", *, tokens: int | None = None, **further: Any) -> RunShape:
    """The numbers of a run by its config; `tokens` are those of the longest row, `args.max_length` by default."""
    if args.max_length is not None and (tokens is None or not args.padding_free):
        tokens = args.max_length if tokens is None else min(tokens, args.max_length)
    if tokens is None:
        raise ValueError("`max_length` is None, so rows may have any length: give that of the longest by `tokens`.")
    known: dict[str, Any] = {
        "rows": args.per_device_train_batch_size,
        "tokens": tokens,
        "accumulation": args.gradient_accumulation_steps,
        "autocast": bool(args.bf16 or args.fp16),
        "checkpointing": bool(args.gradient_checkpointing),
        "padded": not (args.padding_free or args.packing),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "evaluation_rows": args.per_device_eval_batch_size,
        "evaluates": str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no",
        "estimator": args.selector_preset if args.published else args.weight_estimator,
        "pilot_steps": args.pilot_steps,
        "matches": args.matches,
    }
    run = RunShape(**(known | further))
    joined = max(1, run.rows_per_step // 4) if args.validation_loss_weight > 0 else 0
    steps = args.max_steps if args.max_steps > 0 else None
    if steps is None and run.training_rows is not None:
        steps = max(1, round(run.training_rows * args.num_train_epochs / run.rows_per_step))
    return replace(run, joined=joined, steps=steps)


def known_name(name: str) -> str | None:
    """The entry of `KNOWN` that a model's name means: `"meta-llama/Meta-Llama-3-8B-Instruct"` is `"Llama-3-8B"`."""
    plain = name.rsplit("/", 1)[-1].lower().removeprefix("meta-").removesuffix("-instruct").removesuffix("-base")
    return next((known for known in KNOWN if known.lower() == plain), None)


def find_config(name: str, **kwargs: Any) -> tuple[Any, str]:
    """The config of a model, and where it is from: `"folder"`, `"hub"` (or its cache), `"table"` (built in here)."""
    from transformers import AutoConfig

    known, source = known_name(name), "folder" if Path(name).is_dir() else "hub"
    if source == "folder" or known != name:
        try:
            return AutoConfig.from_pretrained(name, **kwargs), source
        except (OSError, ValueError) as error:
            if known is None:
                raise ValueError(
                    f"There is no config of the model {name!r} at hand: {str(error).splitlines()[0]} Give a folder "
                    f"with a config.json by `model_config`, or one of {', '.join(KNOWN)}, which are built in."
                ) from error
    assert known is not None
    numbers = dict(KNOWN[known])
    return AutoConfig.for_model(numbers.pop("model_type"), **numbers), "table"


def model_shape(
    config: Any, *, dtype: str = "float32", peft_config: Any = None, quantised: bool = False
) -> ModelShape:
    """The numbers of a model with the adapters of a run, counted on the meta device: no weight is loaded or made.

    `dtype` may be `"auto"`: what the config says. Of a model that bitsandbytes quantises, TRL keeps the adapters in
    bf16.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    kind = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        parameters = sum(p.numel() for p in model.parameters())
        if peft_config is not None:
            model = get_peft_model(model, peft_config, autocast_adapter_dtype=not quantised)
    text, heads = config.get_text_config(), config.get_text_config().num_attention_heads
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = {name: p.numel() * (2 if quantised else p.itemsize) for name, p in trained.items()}
    adapters = [2 if quantised else p.itemsize for name, p in trained.items() if "lora_" in name]
    head, embedding = (
        any(p.requires_grad for p in module.parameters())
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    return ModelShape(
        family=config.model_type,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        layers=text.num_hidden_layers,
        heads=heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        linears=_linears(model),
        parameters=parameters,
        trainable=sum(p.numel() for p in trained.values()),
        trainable_bytes=sum(sizes.values()),
        copied_bytes=sum(size for name, size in sizes.items() if "modules_to_save" in name),
        adapter_bytes=max(adapters, default=0),
        weight_bytes=kind.itemsize,
        head_trained=head or (tied and embedding),
        embedding_trained=embedding,
        norms_trained=any("norm" in name for name in trained),
        head_norms=any("q_norm" in name for name, _ in model.named_parameters()),
    )


def _linears(model: Any) -> tuple[Linear, ...]:
    """Linear layers inside the decoder's layers, by name; those of mixtures of experts count all experts."""
    import torch

    found: Counter[Linear] = Counter()
    for path, module in model.named_modules():
        parts, base = path.split("."), getattr(module, "base_layer", module)
        inner = any(part.startswith(("lora_", "base_layer", "original_module")) for part in parts)
        if "layers" in parts and isinstance(base, torch.nn.Linear) and not inner:
            name = next(part for part in reversed(parts) if part not in ("default", "modules_to_save"))
            rank = sum(getattr(module, "r", {}).values())
            found[Linear(name, base.in_features, base.out_features, 0, rank, base.weight.requires_grad)] += 1
    return tuple(layer._replace(number=number) for layer, number in found.items())
