"""The pilot's adapters: the same beside any model, exact gradients, no trace afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from tests.weights.conftest import KINDS, make_model, trained_pilot
from trl_bilevel.weights.adapters import RANK, SCALE, Adapter, adapted_modules, upper_layers, widths
from trl_bilevel.weights.language_model import LanguageModel, left_as_it_was


def layers_of(model):
    return LanguageModel(model).decoder()[1]


def filled(adapter, seed=5, size=0.05):
    """The adapter with values that have an effect."""
    generator = torch.Generator().manual_seed(seed)
    for value in adapter.values:
        value.data = (torch.randn(value.shape, generator=generator) * size).to(value.device)
    return adapter


def hooks(model):
    names = [name for name in vars(torch.nn.Module()) if name.endswith("_hooks")]
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


@pytest.mark.parametrize(
    "lora",
    [{}, {"lora_dropout": 0.1}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}],
    ids=lambda s: str(s)[:30],
)
def test_names_and_first_values_do_not_depend_on_an_adapter_of_the_callers(lora, tiny_model):
    plain = Adapter(layers_of(tiny_model()), 3)
    other = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", **lora))
    beside = Adapter(layers_of(other), 3)
    assert [name for name, _ in beside.sites] == [name for name, _ in plain.sites]
    assert len(plain.sites) == 14
    for a, b in zip(plain.values, beside.values, strict=True):
        assert torch.equal(a, b)


def test_scores_do_not_depend_on_a_fresh_adapter_of_the_callers(tiny_model, prepared, trusted):
    """Nor on its dropout, since rows are read in evaluation mode."""
    found = []
    for model in (
        tiny_model(),
        get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)),
        get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"])),
    ):
        model.train()
        pilot = trained_pilot(model, prepared, trusted)
        with left_as_it_was(model):
            found.append(pilot.scores(prepared.batch(range(20))))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_merged_weights(kind, tokenizer, prepared):
    model = make_model(kind, tokenizer).double().eval()
    reader = LanguageModel(model)
    adapter = filled(Adapter(layers_of(model), 3))
    for value in adapter.values:
        value.data = value.data.double()
    batch = prepared.batch(range(6))
    with left_as_it_was(model), adapter.added():
        reader.row_losses(batch).sums.sum().backward()
    found = [value.grad.clone() for value in adapter.values]
    plain = [value.detach().clone().requires_grad_() for value in adapter.values]
    replaced = {}
    names = {id(module): name for name, module in model.named_modules()}
    for (_, module), first, second in zip(adapter.sites, plain[::2], plain[1::2], strict=True):
        delta = SCALE * second @ first
        delta = delta.T if isinstance(module, Conv1D) else delta
        replaced[f"{names[id(module)]}.weight"] = module.weight.detach() + delta
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = torch.func.functional_call(model, replaced, kwargs=inputs).logits
    labels = batch["labels"][:, 1:]
    torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="sum").backward()
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, tiny_model, prepared):
    """Values and gradients stay float32; float16 is computed in float32, where small gradients survive."""
    found = {}
    for wanted in (torch.float32, dtype):
        model = tiny_model().to(wanted).eval()
        adapter = filled(Adapter(layers_of(model), 3))
        with left_as_it_was(model), adapter.added():
            LanguageModel(model).row_losses(prepared.batch(range(6))).sums.sum().backward()
        found[wanted] = torch.cat([value.grad.flatten() for value in adapter.values])
        assert all(value.dtype == value.grad.dtype == torch.float32 for value in adapter.values)
    cosine = torch.nn.functional.cosine_similarity(found[torch.float32], found[dtype], dim=0)
    assert float(cosine) > 0.99


def test_4_bit_models(tiny_model, tokenizer, prepared, trusted, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = tiny_model(hidden_size=64, intermediate_size=128)
    wide.save_pretrained(tmp_path / "model")
    plain = Adapter(layers_of(wide), 3)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization)
    beside = Adapter(layers_of(model), 3)
    assert [name for name, _ in beside.sites] == [name for name, _ in plain.sites]
    for a, b in zip(plain.values, beside.values, strict=True):
        assert torch.equal(a, b)
    pilot = trained_pilot(model, prepared, trusted)
    with left_as_it_was(model):
        scores = pilot.scores(prepared.batch(range(20)))
    assert bool(torch.isfinite(scores).all()) and float(scores[:, 0].std()) > 1e-4


def test_hooks_are_gone_afterwards(tiny_model, prepared, trusted):
    model = tiny_model()
    before = hooks(model)
    adapter = Adapter(layers_of(model), 3)
    with pytest.raises(RuntimeError, match="odd"), adapter.added():
        # One at every linear layer, and one where gradients end.
        assert hooks(model) == before + len(adapter.sites) + 1
        raise RuntimeError("odd")
    assert hooks(model) == before
    trained_pilot(model, prepared, trusted, checkpointing=True)
    assert hooks(model) == before
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(RuntimeError):
        trained_pilot(model, prepared, trusted)
    assert hooks(model) == before


def test_layers_of_gpt2(tokenizer):
    sites = adapted_modules(layers_of(make_model("gpt2", tokenizer)))
    assert len(sites) == 8 and all(isinstance(module, Conv1D) for _, module in sites)
    assert widths(dict(sites)["1.mlp.c_fc"]) == (32, 128)


def test_the_upper_third_is_adapted(tiny_model):
    assert [upper_layers(n) for n in (1, 2, 3, 6, 7, 30)] == [1, 2, 2, 2, 3, 10]
    sites = adapted_modules(layers_of(tiny_model(num_hidden_layers=7)))
    assert {name.split(".")[0] for name, _ in sites} == {"4", "5", "6"}
    adapter = Adapter(layers_of(tiny_model(num_hidden_layers=7)), 0)
    assert all(RANK in value.shape and value.dtype == torch.float32 for value in adapter.values)


def test_layers_without_a_linear_one_are_refused():
    with pytest.raises(ValueError, match="no linear layer.*`data_weight`"):
        adapted_modules([torch.nn.LayerNorm(3)])
