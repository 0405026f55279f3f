"""The shape of a model that is not loaded: its config, laid out on the meta device with the adapters of the run."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .shapes import Linear, ModelShape

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

# What the hub says of well-known models, for when it cannot be reached.
KNOWN: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "text" / "models.yaml").read_text())


def known_name(name: str) -> str | None:
    """The entry of `KNOWN` that a model's name means: `"meta-llama/Meta-Llama-3-8B-Instruct"` is `"Llama-3-8B"`."""
    plain = name.rsplit("/", 1)[-1].lower().removeprefix("meta-").removesuffix("-instruct").removesuffix("-base")
    return next((known for known in KNOWN if known.lower() == plain), None)


def find_config(name: str, **kwargs: Any) -> tuple[PretrainedConfig, str]:
    """The config of a folder, of a hub model, or of a well-known model if the hub cannot be reached.

    Returns:
        The config, and where it is from: `"folder"`, `"hub"` (or its cache), or `"table"`, the numbers built in here.

    Raises:
        ValueError: if there is none.
    """
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
    config: PretrainedConfig, *, dtype: str = "float32", peft_config: PeftConfig | None = None, quantised: bool = False
) -> ModelShape:
    """The numbers of a model with the adapters of a run, counted on the meta device: no weight is loaded or made.

    Args:
        config: of the model.
        dtype (`str`): that it is loaded in, `"float32"`, `"bfloat16"`, `"float16"` or `"auto"` (what the config says).
        peft_config: adapters; full fine-tuning without.
        quantised (`bool`): whether bitsandbytes quantises it; TRL then keeps the adapters in bf16.
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
