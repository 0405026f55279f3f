"""Workaround for bitsandbytes on CPUs."""

import torch


def keep_4bit_weights(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    There, the first forward in eval mode repacks the weights for good, and later training forwards skip autograd:
    wrong gradients, without any error. Training evaluates in between, so the repacking is switched off. No effect on
    GPUs.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
