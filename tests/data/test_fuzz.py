"""Any rows, any way of batching them: what reaches the loss is what a slow, plain reference says."""

from collections import defaultdict

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_tiny_model, make_tokenizer
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.data.identity import SAMPLE_ID, SEGMENTS
from trl_bilevel.trainer.weighted_loss import StepFacts, number_of_rows, tokens_of

MODES = {
    "padded": {},
    "padding_free": {"padding_free": True},
    "bfd": {"packing": True},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
}
SPLITTING = ("bfd_split", "wrapped")
VOCABULARY = 40


@st.composite
def tokenised_rows(draw):
    """Rows of 1 to 20 tokens, some of them several times; any labels masked, all of them too."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=10))
    rows = []
    for length in lengths:
        ids = draw(st.lists(st.integers(5, VOCABULARY), min_size=length, max_size=length))
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        rows.append((ids, [token if scored else -100 for token, scored in zip(ids, mask, strict=True)]))
    return rows + draw(st.lists(st.sampled_from(rows), max_size=3))


def build(mode, folder, columns, max_length, batch_size):
    model = MODEL.setdefault("model", make_tiny_model(TOKENIZER, hidden_size=16, intermediate_size=32).double())
    arguments = {
        "output_dir": str(folder),
        "weight_estimator": "none",
        "per_device_train_batch_size": batch_size,
        "pad_to_multiple_of": 8 if batch_size % 2 else None,
        "max_length": None if mode == "padding_free" else max_length,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    rows = len(next(iter(columns.values())))
    weights = [0.25 + 0.5 * (number % 4) for number in range(rows)]
    return BilevelSFTTrainer(
        model,
        BilevelSFTConfig(**arguments | MODES[mode]),
        train_dataset=Dataset.from_dict(columns | {"data_weight": weights}),
        processing_class=TOKENIZER,
    )


TOKENIZER = make_tokenizer()
MODEL: dict = {}


@torch.no_grad()
def plain_losses(model, ids, labels):
    """Negative log-likelihood of each token after the first, alone and without padding; 0 where it is not scored."""
    if len(ids) < 2:
        return torch.zeros(0, dtype=torch.float64)
    log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(labels[1:])
    losses = -log_probs.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(targets == -100, 0.0, losses)


def check(mode, rows, max_length, batch_size, folder):
    cut = None if mode in ("padding_free", *SPLITTING) else max_length
    wanted = {number: (ids[:cut], labels[:cut]) for number, (ids, labels) in enumerate(rows)}
    wanted = {n: row for n, row in wanted.items() if any(label != -100 for label in row[1][1:])}
    columns = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    if not wanted or (mode not in ("bfd", *SPLITTING) and len(wanted) < batch_size):
        message = "usable rows|has a token to learn from|zero-sized|at least one row|packed rows"
        with pytest.raises(ValueError, match=message):
            build(mode, folder, columns, max_length, batch_size)
        return
    trainer = build(mode, folder, columns, max_length, batch_size)
    trainer.model.eval()
    weights = trainer.sample_weights()
    assert set((~torch.isnan(weights)).nonzero().flatten().tolist()) == set(wanted)
    found, objective = defaultdict(list), trainer._make_objective()
    scale, scored = objective.scale, torch.zeros(len(rows), dtype=torch.float64)
    for batch in trainer.get_train_dataloader():
        ids, segments = batch[SAMPLE_ID].tolist(), batch.get(SEGMENTS)
        if segments is None:
            segments = torch.arange(len(ids)).unsqueeze(1).where(batch["attention_mask"].bool(), torch.tensor(-1))
        expected = torch.zeros(len(ids), dtype=torch.float64)
        for row_ids, row_labels, owners in zip(
            batch["input_ids"].tolist(), batch["labels"].tolist(), segments.tolist(), strict=True
        ):
            whole = [place for place, owner in enumerate(owners) if owner >= 0]
            parts = [[place for place in whole if owners[place] == s] for s in sorted({owners[p] for p in whole})]
            for part in parts:
                found[ids[owners[part[0]]]] += [row_ids[place] for place in part]
            # With `wrapped`, rows see those before them; else each is alone.
            for places in [whole] if mode == "wrapped" else parts:
                losses = plain_losses(trainer.model, [row_ids[p] for p in places], [row_labels[p] for p in places])
                for place, loss in zip(places[1:], losses, strict=True):
                    expected[owners[place]] += loss
        with torch.no_grad():
            # The training loss: weighted, over all scored tokens.
            tokens = (batch["labels"][:, 1:] != -100).sum()
            trainer._step = step = objective.begin([batch], tokens, StepFacts(0, 1, 1, 0.0))
            loss = trainer.compute_loss(trainer.model, step.next_inputs, num_items_in_batch=tokens)
        means = expected / torch.tensor([max(1, n) for n in tokens_of(batch).tolist()])
        torch.testing.assert_close(step.losses[0].double(), means, atol=1e-5, rtol=1e-5)
        assert number_of_rows(batch) == len(ids)
        scored.index_add_(0, torch.tensor(ids), tokens_of(batch).double())
        torch.testing.assert_close(
            loss.double(), scale * (weights[ids] * expected).sum() / max(1, int(tokens)), atol=1e-5, rtol=1e-5
        )
    # The objective is the sum of weighted losses over the sum of weighted tokens, of those that are scored as packed.
    if float(scored.sum()) > 0:
        assert scale == pytest.approx(float(scored.sum() / (torch.nan_to_num(weights) * scored).sum()))
    # Each row once, whole.
    assert {n: sorted(tokens) for n, tokens in found.items()} == {n: sorted(row[0]) for n, row in wanted.items()}


case = given(rows=tokenised_rows(), max_length=st.integers(2, 24), batch_size=st.integers(1, 4))
quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("mode", MODES)
@case
@settings(max_examples=15, **quiet)
def test_batches(mode, tmp_path_factory, rows, max_length, batch_size):
    check(mode, rows, max_length, batch_size, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@case
@settings(max_examples=100, **quiet)
def test_batches_at_length(mode, tmp_path_factory, rows, max_length, batch_size):
    check(mode, rows, max_length, batch_size, tmp_path_factory.getbasetemp())
