"""Row losses against the model's own logits; what is read of a model leaves no trace in it."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertModel

from tests.weights.conftest import KINDS, make_model
from trl_bilevel.weights import language_model as module
from trl_bilevel.weights.language_model import LanguageModel, checkpointed, evaluating, left_as_it_was


def reference(model, batch):
    """Summed losses, scored tokens and mean losses of ends from all logits of the whole model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    scored = labels != -100
    ends = scored & ~torch.nn.functional.pad(scored[:, 1:], (0, 1), value=False)
    return losses.sum(-1), scored.sum(-1), (losses * ends).sum(-1) / ends.sum(-1).clamp(min=1)


@pytest.mark.parametrize("chunk", [512, 7, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_models_own_logits(kind, chunk, tokenizer, prepared, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_TOKENS", chunk)
    model = make_model(kind, tokenizer).eval()
    batch = prepared.batch(range(9))
    assert int((batch["labels"][:, 1:] != -100).sum()) > 2 * min(chunk, 7)
    sums, counts, endings = reference(model, batch)
    for found in (LanguageModel(model).row_losses(batch), torch.no_grad()(LanguageModel(model).row_losses)(batch)):
        torch.testing.assert_close(found.sums, sums, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.counts, counts.float())
        torch.testing.assert_close(found.endings, endings, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found.means(), (sums / counts).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_loss(kind, chunk, tokenizer, prepared, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_TOKENS", chunk)
    model = make_model(kind, tokenizer).eval()
    batch, factors = prepared.batch(range(9)), torch.linspace(-1, 2, 9)
    (factors * LanguageModel(model).row_losses(batch).sums).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (factors * reference(model, batch)[0]).sum().backward()
    for a, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=2e-4, rtol=1e-4)


def test_rows_of_more_than_a_chunk(tokenizer, tiny_model, rows):
    """512 scored tokens and one more."""
    from tests.weights.conftest import prepare

    text = " ".join(row["completion"] for row in rows)
    prepared = prepare([{"prompt": "a", "completion": text}] * 2 + rows[:2], tokenizer, max_length=258)
    batch = prepared.batch(range(4))
    assert int((batch["labels"][:, 1:] != -100).sum()) > module.LOGIT_TOKENS
    model = tiny_model(max_position_embeddings=512).eval()
    sums, _, _ = reference(model, batch)
    torch.testing.assert_close(LanguageModel(model).row_losses(batch).sums, sums, atol=1e-3, rtol=1e-5)


def test_a_batch_without_a_scored_token(tiny_model, prepared):
    batch = prepared.batch(range(3))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model = tiny_model()
    found = LanguageModel(model).row_losses(batch)
    assert found.sums.tolist() == [0.0] * 3 and found.means().tolist() == [0.0] * 3
    found.sums.sum().backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


def test_a_row_does_not_depend_on_its_batch(tiny_model, prepared):
    reader = LanguageModel(tiny_model().double().eval())
    together = reader.row_losses(prepared.batch(range(12))).sums
    alone = torch.cat([reader.row_losses(prepared.batch([n])).sums for n in range(12)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-6)


def test_mean_losses_of_rows(tiny_model, prepared):
    model = tiny_model().train()
    found = LanguageModel(model).mean_losses(prepared, 7)
    sums, counts, _ = reference(model.eval(), prepared.batch(range(len(prepared))))
    torch.testing.assert_close(found, (sums / counts).detach(), atol=1e-4, rtol=1e-4)


def test_virtual_tokens_of_prompt_learning(tiny_model, prepared):
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    batch = prepared.batch(range(5))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 3:]
    labels = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none").sum(-1)
    torch.testing.assert_close(LanguageModel(model).row_losses(batch).sums, expected, atol=1e-4, rtol=1e-5)


def test_bf16_under_autocast(tiny_model, prepared):
    model = tiny_model().eval()
    batch = prepared.batch(range(5))
    plain, rounded = (LanguageModel(model, bf16).row_losses(batch).sums for bf16 in (False, True))
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(plain, rounded, rtol=0.02, atol=0.5)
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_layers(kind, tokenizer, prepared):
    model = make_model(kind, tokenizer, num_hidden_layers=4) if kind != "gpt2" else make_model(kind, tokenizer)
    model.eval()
    reader = LanguageModel(model)
    batch = prepared.batch(range(4))
    calls = []
    layers = reader.decoder()[1]
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    first, second = reader.states(batch, [0.3, 0.5])
    assert calls == list(range(len(layers) // 2))
    hidden = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states
    places = [max(1, round(depth * len(layers))) for depth in (0.3, 0.5)]
    torch.testing.assert_close(first, hidden[places[0]].detach())
    torch.testing.assert_close(second, hidden[places[1]].detach())


def test_models_that_cannot_be_read(tiny_model, prepared):
    with pytest.raises(ValueError, match="no output embeddings.*AutoModelForCausalLM"):
        LanguageModel(BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)))
    model = tiny_model()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="no list of layers.*`data_weight`"):
        LanguageModel(model).decoder()
    model = tiny_model()
    model.model.layers[0].register_forward_hook(lambda layer, args, output: output[None])
    with pytest.raises((ValueError, RuntimeError)):
        LanguageModel(model).states(prepared.batch([0, 1]), [0.5])
    model = tiny_model()
    model.lm_head.forward, head = None, model.lm_head
    model.get_output_embeddings = lambda: torch.nn.Linear(32, 5)
    model.lm_head = torch.nn.Linear(32, 5)
    assert head is not model.lm_head
    with pytest.raises(ValueError, match="does not call its output embeddings"):
        LanguageModel(model).row_losses(prepared.batch([0]))


def state_of(model):
    """All that choosing must not change."""
    return {
        "values": [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())],
        "wanted": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [part.training for part in model.modules()],
        "names": [sorted(vars(part)) for part in model.modules()],
        "hooks": [
            len(value) for part in model.modules() for name, value in vars(part).items() if name.endswith("_hooks")
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
        "autograd": torch.is_grad_enabled(),
    }


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return bool((first == second).all())
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "frozen"])
def test_the_model_is_left_as_it_was(kind, fails, tiny_model, prepared, trusted):
    from tests.weights.conftest import trained_pilot

    model = tiny_model(attention_dropout=0.1)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    if kind == "frozen":
        model.model.layers[0].requires_grad_(False)
    model.train()
    model.get_input_embeddings().eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = state_of(model)
    if fails:
        with pytest.raises(KeyError), left_as_it_was(model):
            torch.rand(3)
            raise KeyError("odd")
    else:
        trained_pilot(model, prepared, trusted, checkpointing=True)
        with left_as_it_was(model):
            torch.rand(3)
            LanguageModel(model).states(prepared.batch([0, 1]), [0.5])
    after = state_of(model)
    for name, value in before.items():
        assert same(value, after[name]), name


def test_within_nothing_of_the_models_takes_a_gradient(tiny_model):
    model = tiny_model().train()
    with left_as_it_was(model):
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
    with evaluating(model):
        assert not model.training
    assert model.training


def test_checkpointed_layers_compute_the_same(tiny_model, prepared):
    model = tiny_model().eval()
    batch, found = prepared.batch(range(6)), []
    names = [sorted(vars(layer)) for layer in model.model.layers]
    for layers in ([], model.model.layers):
        model.zero_grad()
        with checkpointed(layers):
            LanguageModel(model).row_losses(batch).sums.sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert [sorted(vars(layer)) for layer in model.model.layers] == names
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in model.model.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_whose_logits_are_changed_otherwise_are_refused(kind, tokenizer, prepared):
    model = make_model(kind, tokenizer).eval()
    LanguageModel(model).check_logits(prepared.batch([0]))
    LanguageModel(model, bf16=True).check_logits(prepared.batch([0]))
    forward = model.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    model.forward = doubled
    with pytest.raises(ValueError, match="changes the logits.*`data_weight`"):
        LanguageModel(model).check_logits(prepared.batch([0]))


def test_the_cap_of_recurrent_gemma_is_known(tokenizer, prepared):
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    torch.manual_seed(0)
    small = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = RecurrentGemmaConfig(**small, vocab_size=len(tokenizer), lru_width=32, logits_soft_cap=0.05)
    model = RecurrentGemmaForCausalLM(config).eval()
    sums, _, _ = reference(model, batch := prepared.batch([2]))
    torch.testing.assert_close(LanguageModel(model).row_losses(batch).sums, sums, atol=1e-4, rtol=1e-5)
