"""Folders of models and of adapters."""

from __future__ import annotations

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
