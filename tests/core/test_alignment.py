"""Gradient inner products against autograd, one row at a time."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from trl_bilevel.estimators.taps import GradientTaps, untappable_layers

from trl_bilevel.core import alignment as core

TOLERANCE = 1e-5


def random_direction(taps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    taps.direction = core.unit_length([torch.randn(p.shape, generator=generator) for p in taps.parameters])
    return taps.direction


def reference(losses, taps):
    """`<grad loss, U>` and `|grad loss|` of each loss by autograd."""
    products, norms = [], []
    for loss in losses:
        grads = torch.autograd.grad(loss, taps.parameters, retain_graph=True, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(taps.parameters, grads, strict=True)]
        products.append(sum((g * u).sum() for g, u in zip(grads, taps.direction, strict=True)))
        norms.append(sum(g.square().sum() for g in grads).sqrt())
    return torch.stack(products).float(), torch.stack(norms).float()


def assert_close(found, expected, tolerance=TOLERANCE):
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


class Net(nn.Module):
    """Embedding, linear layers with and without bias, one of them used twice, a norm; in-place on a tapped output."""

    def __init__(self, wide=12):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 8, padding_idx=0)
        self.first = nn.Linear(8, wide)
        self.twice = nn.Linear(wide, wide, bias=False)
        self.norm = nn.LayerNorm(wide)
        self.last = nn.Linear(wide, 5)
        self.repeat = True

    def body(self, ids):
        hidden = self.first(self.tokens(ids))
        hidden *= 1.5
        hidden = torch.tanh(self.twice(hidden))
        if self.repeat:
            hidden = torch.tanh(self.twice(input=hidden))
        # Tokens of a row talk to each other, as in attention.
        hidden = hidden.cumsum(1) / torch.arange(1, ids.shape[1] + 1).view(1, -1, 1)
        return self.last(self.norm(hidden))

    def forward(self, ids, how=None):
        if how is None:
            return self.body(ids).log_softmax(-1)[..., 0]
        return checkpoint(lambda x, _: self.body(x), ids, self.first.weight, use_reentrant=how).log_softmax(-1)[..., 0]


@pytest.fixture
def ids():
    return torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", [None, True, False], ids=["plain", "reentrant", "non_reentrant"])
def test_taps_agree_with_autograd(how, ids):
    net = Net()
    taps = GradientTaps(net)
    assert taps.left_out == ["norm.weight", "norm.bias"]
    random_direction(taps)
    factors = torch.tensor([0.3, 2.0, 0.0, 1e-4])
    expected, _ = reference(-net(ids).mean(-1), taps)
    net.zero_grad()
    with taps.watch(4) as sink:
        log_probs = net(ids, how)
        sink.attach(log_probs, torch.ones_like(log_probs))
        # A second loss term that multiplies: what counts is what the backward really did.
        (-(log_probs.sum(-1) * factors).sum() * 7 / 3).backward()
    found = sink.scores()
    assert torch.isnan(found).tolist() == [False, False, True, False]
    live = factors > 0
    assert_close(found[live], expected[live], 1e-4)
    torch.testing.assert_close(sink.factors, factors * 7 * 7 / 3)


@pytest.mark.parametrize("wide", [6, 300], ids=["narrow", "wide"])
def test_norms_agree_with_autograd(wide, ids):
    """`wide` is past the width up to which norms are taken from the gradient itself."""
    net = Net(wide)
    net.repeat = False
    if wide > core.NARROW:
        net.first, net.tokens = nn.Linear(300, wide), nn.Embedding(20, 300, padding_idx=0)
        net.last = nn.Linear(wide, 300)
    taps = GradientTaps(net)
    random_direction(taps)
    products, norms = reference(-net(ids).mean(-1), taps)
    with taps.watch(4, norms=True) as sink:
        log_probs = net(ids)
        sink.attach(log_probs, torch.ones_like(log_probs))
        (-log_probs.sum(-1) * torch.tensor([0.3, 2.0, 0.1, 5.0])).sum().backward()
    assert_close(sink.scores(), products / norms)
    assert_close(sink.square_norms.sqrt() / sink.factors, norms)


def test_norms_of_a_layer_used_twice_are_refused(ids):
    net = Net()
    taps = GradientTaps(net)
    random_direction(taps)
    with (
        pytest.raises(ValueError, match="'twice' is used several times.*alignment_normalise"),
        taps.watch(4, norms=True),
    ):
        net(ids).sum().backward()


def test_the_backward_is_left_as_it_was(ids):
    net = Net()
    (-net(ids).sum()).backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    taps = GradientTaps(net)
    random_direction(taps)
    with taps.watch(4):
        (-net(ids).sum()).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), plain, strict=True))
    assert not any(layer._forward_hooks for layer in net.modules())


def test_taps_keep_nothing_that_autograd_does_not_keep():
    """Also not under a frozen base with adapters, where only the adapter's layers are tapped."""
    torch.manual_seed(0)
    base, down, up = nn.Linear(16, 16), nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
    base.requires_grad_(False)
    net = nn.ModuleDict({"base": base, "down": down, "up": up})
    taps = GradientTaps(net)
    random_direction(taps)
    inputs = torch.randn(3, 5, 16, requires_grad=True)

    def kept(watched):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if watched:
                with taps.watch(3):
                    loss = torch.tanh(base(inputs) + up(down(inputs))).sum()
            else:
                loss = torch.tanh(base(inputs) + up(down(inputs))).sum()
        return loss, sum(storages.values())

    assert kept(True)[1] == kept(False)[1]


def test_a_tied_embedding_and_foreign_layers_are_left_out():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.ModuleDict({"a": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "odd": Doubled(4, 4)})
    net["head"].weight = net["a"].weight
    net["own"] = nn.Linear(4, 4)
    taps = GradientTaps(net, skip=[net["head"]])
    assert taps.left_out == ["a.weight", "odd.weight", "odd.bias"]
    assert [place.name for place in taps.places] == ["own"]
    net["own"].requires_grad_(False)
    with pytest.raises(ValueError, match="none of the trainable parameters.*a.weight.*'lookahead'"):
        GradientTaps(net, skip=[net["head"]])


def test_tokens_that_cannot_be_told_apart_are_refused():
    net = nn.Sequential(nn.Linear(4, 4))
    taps = GradientTaps(net)
    with pytest.raises(RuntimeError, match="direction"), taps.watch(3):
        pass
    random_direction(taps)
    with pytest.raises(ValueError, match=r"'0' gives \(5, 4\) for 3 rows"), taps.watch(3):
        net(torch.randn(5, 4))
    with taps.watch(3) as sink:
        net(torch.ones(6, 4)).sum().backward()
    torch.testing.assert_close(sink.products, sink.products[:1].expand(3))


def test_gradients_that_come_by_another_way_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.borrowed, self.idle = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x):
            return self.called(x) + nn.functional.linear(x, self.borrowed.weight)

    net = Odd()
    taps = GradientTaps(net)
    random_direction(taps)
    message = "'borrowed' have a gradient, but the layer was not called.*'lookahead'"
    with pytest.raises(ValueError, match=message), taps.watch(3):
        net(torch.ones(3, 2, 4)).sum().backward()
    net.zero_grad()
    net.borrowed.requires_grad_(False)
    taps = GradientTaps(net)
    random_direction(taps)
    for _ in range(2):
        with taps.watch(3):
            net(torch.ones(3, 2, 4)).sum().backward()


def test_packed_segments_equal_separate_rows(tiny_model):
    model = tiny_model()
    taps = GradientTaps(model, untappable_layers(model))
    assert "lm_head.weight" in taps.left_out and any("embed_tokens" in place.name for place in taps.places)
    random_direction(taps)
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 2, 7]
    rows = [torch.randint(3, 500, (1, n), generator=generator) for n in lengths]

    def log_probs(ids, scored, **inputs):
        logits = model(ids, use_cache=False, **inputs).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None]).squeeze(-1) * scored

    expected, _ = reference([-log_probs(ids, 1.0).mean() for ids in rows], taps)
    packed = torch.cat([*rows, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    positions = torch.cat([torch.arange(n) for n in [*lengths, 3]]).unsqueeze(0)
    segments = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, -1]), torch.tensor([*lengths, 3])).unsqueeze(0)
    scored = ((positions[:, 1:] > 0) & (segments[:, 1:] >= 0)).float()
    weights = torch.tensor([1.0, 0.2, 3.0, 0.7])
    with taps.watch(4, segments=segments) as sink:
        found = log_probs(packed, scored, position_ids=positions)
        sink.attach(found, scored)
        (-found * weights[segments[:, 1:]]).sum().backward()
    assert_close(sink.scores(), expected, 1e-4)
    with pytest.raises(ValueError, match="packed segments"), taps.watch(4, segments=segments, norms=True):
        pass


def test_a_row_like_validation_scores_above_its_opposite():
    """Linear regression by hand: the gradient of a row `x -> y` is `(w x - y) x`."""
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.zero_()
    taps = GradientTaps(net)
    validation_x, validation_y = torch.tensor([1.0, 0.5]), 1.0
    taps.direction = core.unit_length([-(validation_y * validation_x).unsqueeze(0)])
    rows = torch.stack([validation_x, validation_x, torch.tensor([-0.5, 1.0])]).unsqueeze(1)
    targets = torch.tensor([1.0, -1.0, 1.0])
    with taps.watch(3) as sink:
        (0.5 * (net(rows).flatten() - targets) ** 2).sum().backward()
    length = float(validation_x.norm())
    torch.testing.assert_close(sink.scores(), torch.tensor([length, -length, 0.0]))


def test_wide_products_of_bf16_stay_close():
    torch.manual_seed(0)
    a, b, u = torch.randn(3, 6, 300), torch.randn(3, 6, 400), torch.randn(400, 300)
    exact = torch.einsum("rto,oi,rti->r", b.bfloat16().double(), u.double(), a.bfloat16().double())
    found = core.sum_rows(core.linear_products(a.bfloat16(), b.bfloat16(), u), 3)
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, 1e-2)
    # The narrow side of an adapter is computed in float32.
    exact = torch.einsum("rto,oi,rti->r", b[..., :4].bfloat16().double(), u[:4].double(), a.bfloat16().double())
    found = core.sum_rows(core.linear_products(a.bfloat16(), b[..., :4].bfloat16(), u[:4]), 3)
    assert_close(found.double(), exact, 1e-5)


def test_preconditioning_is_an_adam_step_without_momentum():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5))
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.0, 0.99), eps=1e-6)
    for _ in range(3):
        parameter.grad = torch.randn(5)
        optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    before, parameter.grad = parameter.detach().clone(), torch.randn(5)
    optimizer.step()
    found = core.preconditioned(parameter.grad, state["exp_avg_sq"], state["step"], 0.99, 1e-6)
    torch.testing.assert_close(found, (before - parameter.detach()) / 0.1, rtol=1e-4, atol=1e-5)
    # What training never touched does not outweigh the rest.
    assert float(core.preconditioned(torch.tensor(1e-4), torch.tensor(0.0), torch.tensor(99.0), 0.999, 1e-8)) < 20


def test_unit_length():
    tensors = core.unit_length([torch.tensor([3.0]), torch.tensor([[4.0]])])
    torch.testing.assert_close(torch.cat([t.flatten() for t in tensors]), torch.tensor([0.6, 0.8]))
    assert core.unit_length([torch.zeros(2)])[0].tolist() == [0.0, 0.0]
