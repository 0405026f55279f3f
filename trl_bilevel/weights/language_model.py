"""A causal language model as choosing reads it: losses of rows, hidden states, and a way to leave it as it was."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.scores import RowLosses, row_losses
from ..data.identity import SAMPLE_ID, SEGMENTS
from ..data.rows import Rows

# Tokens whose logits are in memory at a time: 100 MB in float32 for a vocabulary of 50,000.
LOGIT_TOKENS = 512
NOT_INPUTS = ("labels", SAMPLE_ID, SEGMENTS)


class _ReachedDepth(Exception):
    """Ends a forward once the wanted states are there: the layers above are not computed."""


class LanguageModel:
    """Reads a (PEFT) causal language model, not wrapped by DDP or the like, and changes nothing of it.

    Args:
        bf16 (`bool`): compute in bfloat16 under autocast, as `bf16=True` of a trainer does.

    Raises:
        ValueError: if the model has no output embeddings.
    """

    def __init__(self, model: Any, bf16: bool = False):
        self.model = model
        self.bf16 = bf16
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.head: Any = self.base.get_output_embeddings() if hasattr(self.base, "get_output_embeddings") else None
        if self.head is None:
            raise ValueError(
                f"{type(self.base).__name__} has no output embeddings: rows are scored by the likelihood of their "
                "tokens. Use a causal language model (`AutoModelForCausalLM`)."
            )

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.base.get_input_embeddings().weight.device

    def row_losses(self, batch: Mapping[str, Any]) -> RowLosses:
        """Losses of the rows of a collated batch, packed or not; logits of all tokens are never made at once."""
        with self._precision():
            hidden = self._last_states(batch)
            labels = batch["labels"].to(hidden.device)
            scored = labels[:, 1:] != -100
            picked, targets = hidden[:, :-1][scored], labels[:, 1:][scored]
            found = [
                self._log_probs(picked[start : start + LOGIT_TOKENS], targets[start : start + LOGIT_TOKENS])
                for start in range(0, len(targets), LOGIT_TOKENS)
            ]
        values = torch.cat(found) if found else _at_least_float32(picked.sum(-1))
        log_probs = torch.zeros(scored.shape, dtype=values.dtype, device=hidden.device).masked_scatter(scored, values)
        if SEGMENTS not in batch:
            return row_losses(log_probs, scored)
        return row_losses(log_probs, scored, batch[SEGMENTS][:, 1:].to(hidden.device), len(batch[SAMPLE_ID]))

    def _log_probs(self, states: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities `[n]` of `targets` after `states` `[n, d]`; a backward makes the logits again."""

        def compute(states: Tensor) -> Tensor:
            logits = _at_least_float32(self._final(self.head(states)))
            return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

        if not torch.is_grad_enabled():
            return compute(states)
        return checkpoint(compute, states, use_reentrant=False, preserve_rng_state=False)

    def _final(self, logits: Tensor) -> Tensor:
        """What some models do to the logits of their head (see their `config`): a scale, a soft cap."""
        config = self.base.config.get_text_config()

        def setting(*names: str) -> float | None:
            values = (getattr(config, name, None) for name in names)
            return next((value for value in values if value is not None), None)

        scale, divisor = setting("logit_scale", "output_multiplier", "lm_head_multiplier"), setting("logits_scaling")
        if divisor is not None:
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        logits = logits if scale in (None, 1.0) else logits * scale
        cap = setting("final_logit_softcapping", "logits_soft_cap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def check_logits(self, batch: Mapping[str, Any], tokens: int = 16) -> None:
        """Refuse a model that does something else to the logits of its head than `_final` knows: losses were wrong.

        Of the batch, the first `tokens` of each row are read.
        """
        found: list[Tensor] = []
        inputs = {k: v[:, :tokens] for k, v in self._token_inputs(batch).items()}
        with self.head.register_forward_hook(lambda head, args, output: found.append(output)), self._precision():
            own = self.base(**inputs, use_cache=False).logits.float()
        if found and not torch.allclose(
            own, self._final(found[0]).float(), rtol=0, atol=0.02 * float(own.abs().max())
        ):
            raise ValueError(
                f"{type(self.base).__name__} changes the logits of its output embeddings in a way that is not known "
                f"here, so its rows cannot be scored. {UNREADABLE}"
            )

    def _last_states(self, batch: Mapping[str, Any]) -> Tensor:
        """Hidden states `[B, S, d]` that the head is given."""
        found: list[Tensor] = []

        def take(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            found.append(args[0])
            # The model's own forward then makes logits of one token a row, which nobody reads.
            return (args[0][:, :1], *args[1:])

        with self.head.register_forward_pre_hook(take):
            self.model(**self.inputs(batch), use_cache=False)
        if not found:
            raise ValueError(
                f"The forward of {type(self.base).__name__} does not call its output embeddings, so its rows cannot "
                "be scored."
            )
        # Prompt learning puts virtual tokens before the row's own.
        return found[0][:, -batch["input_ids"].shape[1] :]

    @torch.no_grad()
    def mean_losses(self, rows: Rows, batch_size: int) -> Tensor:
        """Mean loss per token of prepared rows, float32 `[rows]` on the CPU, in nats, in evaluation mode."""
        out = torch.zeros(len(rows))
        with evaluating(self.model):
            for start in range(0, len(rows), batch_size):
                places = list(range(start, min(start + batch_size, len(rows))))
                out[places] = self.row_losses(rows.batch(places)).means().float().cpu()
        return out

    @torch.no_grad()
    def states(self, batch: Mapping[str, Any], depths: Sequence[float]) -> list[Tensor]:
        """Hidden states float32 `[B, S, d]` after shares of the layers (at least one); those above are not run."""
        decoder, layers = self.decoder()
        places = [max(0, round(depth * len(layers)) - 1) for depth in depths]
        found: dict[int, Tensor] = {}

        def keep(place: int, layer: torch.nn.Module, args: Any, output: Any) -> None:
            found[place] = output[0] if isinstance(output, tuple) else output
            if place == max(places):
                raise _ReachedDepth

        inputs = self._token_inputs(batch)
        with suppress(_ReachedDepth), ExitStack() as hooks, self._precision():
            for place in set(places):
                hooks.enter_context(layers[place].register_forward_hook(partial(keep, place)))
            decoder(**inputs, use_cache=False)
        for state in found.values():
            if state.ndim != 3 or state.shape[:2] != inputs["input_ids"].shape:
                raise ValueError(
                    f"The layers of {type(decoder).__name__} give states of shape {tuple(state.shape)} for tokens of "
                    f"shape {tuple(inputs['input_ids'].shape)}, which cannot be read. {UNREADABLE}"
                )
        return [found[place].float() for place in places]

    def decoder(self) -> tuple[Any, Any]:
        """The decoder, and its list of layers; a `ValueError` if the model is not built that way."""
        base = self.base
        decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
        if decoder is base:
            decoder = getattr(base, "model", None)
        lists = {}
        if isinstance(decoder, torch.nn.Module):
            lists = {name: part for name, part in decoder.named_children() if isinstance(part, torch.nn.ModuleList)}
        count = getattr(base.config.get_text_config(), "num_hidden_layers", None)
        # Nearly all models name them so; GPT-2 and its kin do not.
        layers = lists.get("layers") or next((part for part in lists.values() if len(part) == count), None)
        if layers is None:
            raise ValueError(f"{type(base).__name__} has no list of layers to read hidden states from. {UNREADABLE}")
        return decoder, layers

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model's forward is given of a batch, on its device."""
        device = self.device
        own = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in own.items()}

    def _token_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in self.inputs(batch).items() if name in ("input_ids", "attention_mask")}

    def _precision(self) -> Any:
        if not self.bf16:
            return nullcontext()
        # Without its cache: casts of an adapter that is being trained would be those of an earlier step.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)


def _at_least_float32(values: Tensor) -> Tensor:
    """Of a float64 model all stays float64: differences of losses are small beside the losses."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


UNREADABLE = "Choosing needs them. Give the weights in a column `data_weight`, learned with another model if need be."


def model_hash(model: torch.nn.Module, values: int = 8) -> str:
    """A hash of a few values of every parameter: another one after any training."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // values)][:values].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's mode is put back afterwards."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter of the model's takes a gradient; all is put back afterwards, random states too."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model):
        try:
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, wants in wanted:
                parameter.requires_grad_(wants)


@contextmanager
def parameters_kept(model: torch.nn.Module) -> Iterator[None]:
    """Put parameters and buffers back afterwards, as they were.

    For continuous batching TRL turns the whole model into bf16 in place, and leaves it so: optimizer and snapshot
    would then hold other dtypes than the model.
    """
    parameters = [(p, p.data) for p in model.parameters()]
    buffers = [(m, name, b) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in parameters:
            if parameter.data.dtype != data.dtype:
                parameter.data = data
        for module, name, buffer in buffers:
            if getattr(module, name).dtype != buffer.dtype:
                setattr(module, name, buffer)


@contextmanager
def checkpointed(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Layers that can, keep their inputs only and compute again in the backward; without dropout, as before."""

    def recompute(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    able = [layer for layer in layers if hasattr(layer, "gradient_checkpointing")]
    before = [{name: vars(layer)[name] for name in names if name in vars(layer)} for layer in able]
    try:
        for layer in able:
            # The layer's own flag alone: the modules within stay in evaluation mode.
            vars(layer).update(zip(names, (True, recompute, True), strict=True))
        yield
    finally:
        for layer, values in zip(able, before, strict=True):
            for name in names:
                vars(layer).pop(name, None)
            vars(layer).update(values)
