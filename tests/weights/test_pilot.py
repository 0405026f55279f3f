"""The two ends of the score: alike without the trusted rows, and scores as a slow, plain reference gives them."""

import copy

import pytest
import torch

from tests.weights.conftest import prepare, trained_pilot, trusted_sets
from trl_bilevel.weights.adapters import SCALE
from trl_bilevel.weights.errors import NonFiniteScoreError
from trl_bilevel.weights.language_model import LanguageModel, left_as_it_was
from trl_bilevel.weights.pilot import Pilot, PilotRecipe, train_step


def scores_of(pilot, rows):
    with left_as_it_was(pilot.model.model):
        return pilot.scores(rows.batch(range(len(rows))))


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-3, 1e-2, 0.3])
def test_without_pull_all_scores_are_zero(learning_rate, tiny_model, prepared, trusted):
    """The null test: both ends learn by the same recipe, whatever the learning rate."""
    pilot = trained_pilot(tiny_model(), prepared, trusted, learning_rate=learning_rate, pull=0.0, steps=6)
    moved = zip(pilot.mixture.values, Pilot(pilot.model, pilot.recipe).mixture.values, strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)
    assert torch.count_nonzero(scores_of(pilot, prepared)[:, 0]) == 0
    for mixture, pulled in zip(pilot.mixture.values, pilot.pulled.values, strict=True):
        assert torch.equal(mixture, pulled)


def test_with_pull_they_are_not(tiny_model, prepared, trusted):
    scores = scores_of(trained_pilot(tiny_model(), prepared, trusted), prepared)
    assert float(scores[:, 0].std()) > 1e-4


def test_both_ends_start_equal_and_without_effect(tiny_model, prepared):
    model = tiny_model()
    pilot = Pilot(LanguageModel(model), PilotRecipe(1, 1e-3, 7))
    for mixture, pulled in zip(pilot.mixture.values, pilot.pulled.values, strict=True):
        assert torch.equal(mixture, pulled)
    batch = prepared.batch(range(8))
    with torch.no_grad():
        plain = pilot.model.row_losses(batch).sums
        with pilot.pulled.added():
            assert torch.equal(pilot.model.row_losses(batch).sums, plain)
    other = Pilot(LanguageModel(model), PilotRecipe(1, 1e-3, 8))
    assert not torch.equal(pilot.mixture.values[0], other.mixture.values[0])


def merged(model, end):
    """The model with an end's updates added to copies of its weights."""
    out = copy.deepcopy(model)
    modules = dict(out.model.layers.named_modules())
    for (name, _), first, second in zip(end.sites, end.values[::2], end.values[1::2], strict=True):
        modules[name].weight.data += (SCALE * second @ first).detach()
    return out


def mean_losses(model, dataset):
    """Row by row, from the model's own logits."""
    out = []
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        out.append(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100))
    return torch.stack(out)


def test_scores_are_those_of_merged_weights(tiny_model, prepared, trusted):
    model = tiny_model()
    pilot = trained_pilot(model, prepared, trusted)
    mixture, pulled = (mean_losses(merged(model, end), prepared.dataset) for end in (pilot.mixture, pilot.pulled))
    torch.testing.assert_close(scores_of(pilot, prepared)[:, 0], 1 - pulled / mixture, atol=2e-6, rtol=1e-4)


def test_the_same_arguments_give_the_same_bits(tiny_model, prepared, trusted):
    first, second = (scores_of(trained_pilot(tiny_model(), prepared, trusted), prepared) for _ in range(2))
    assert torch.equal(first, second)


def test_checkpointing_changes_nothing(tiny_model, prepared, trusted):
    first, second = (
        scores_of(trained_pilot(tiny_model(), prepared, trusted, checkpointing=on), prepared) for on in (False, True)
    )
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_the_order_of_the_rows_does_not_matter(tiny_model, mixed, tokenizer, trusted):
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(1)).tolist()
    sets = [prepare(rows, tokenizer) for rows in (mixed, [mixed[n] for n in order])]
    pilots = [trained_pilot(tiny_model(), rows, trusted) for rows in sets]
    for a, b in zip(pilots[0].pulled.values, pilots[1].pulled.values, strict=True):
        assert torch.equal(a, b)


def test_values_survive_a_file(tiny_model, prepared, trusted):
    model = tiny_model()
    pilot = trained_pilot(model, prepared, trusted)
    other = Pilot(pilot.model, pilot.recipe)
    other.load_tensors(pilot.tensors())
    assert torch.equal(scores_of(other, prepared), scores_of(pilot, prepared))


def test_a_gradient_that_is_not_finite_stops_the_pilot(tiny_model, prepared, trusted):
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteScoreError, match="`pilot_learning_rate`"):
        trained_pilot(model, prepared, trusted)


class Noting:
    """An optimizer that notes the gradients."""

    def __init__(self, end):
        self.end = end

    def step(self):
        self.gradients = torch.cat([value.grad.flatten() for value in self.end.values])

    def zero_grad(self, set_to_none):
        pass


@pytest.mark.parametrize("tokens", [1e2, 1e4, 1e5])
def test_small_gradients_survive_float16(tokens, tiny_model, prepared):
    """The loss of a step is divided by its tokens: what is left of it must not be lost in the model's layers."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = tiny_model().to(dtype).eval()
        pilot = Pilot(LanguageModel(model), PilotRecipe(1, 1e-3, 3))
        for value in pilot.pulled.values:
            value.data += 0.05
        noting = Noting(pilot.pulled)
        with left_as_it_was(model):
            parts = [(prepared.batch(range(6)), torch.full((6,), 1 / tokens))]
            train_step(pilot.model, pilot.pulled, noting, parts)
        found[dtype] = noting.gradients
    lost = (found[torch.float16] - found[torch.float32]).norm() / found[torch.float32].norm()
    assert float(lost) < 0.01


def test_sets_pull_by_their_weights(tiny_model, rows, mixed, tokenizer):
    """A set of weight 0 has no say."""
    model, prepared = tiny_model(), prepare(mixed, tokenizer)
    other = [row | {"completion": "x"} for row in rows[60:80]]
    pilots = [
        trained_pilot(model, prepared, trusted_sets(tokenizer, {"a": 1.0, "b": 0.0}, a=rows[40:60], b=second))
        for second in (rows[60:80], other)
    ]
    for a, b in zip(pilots[0].pulled.values, pilots[1].pulled.values, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
