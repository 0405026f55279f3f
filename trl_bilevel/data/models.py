"""Loading of models that are named by a hub name or a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def is_adapter(name: str) -> bool:
    """Whether a folder holds a PEFT adapter in place of a model."""
    return (Path(name) / "adapter_config.json").is_file()


def load_adapter(folder: str, kwargs: Mapping[str, Any]) -> Any:
    """The base model with the adapter of a folder, ready to train on.

    Args:
        folder (`str`): of the adapter.
        kwargs: of `from_pretrained`: dtype, revision, quantization_config ...
    """
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, **kwargs)


def load_model(name: str, **kwargs: Any) -> Any:
    """A causal language model, or the model beneath an adapter's folder with the adapter, on a GPU if there is one.

    Args:
        kwargs: for `from_pretrained`. The dtype is float32 by default, as in TRL's trainers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kwargs = {"dtype": torch.float32} | kwargs
    if is_adapter(name):
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(name, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    if placed or not torch.cuda.is_available():
        return model
    return model.to(torch.device("cuda", torch.cuda.current_device()))
