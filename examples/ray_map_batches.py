"""Weigh a corpus on a Ray cluster: the scorer is a function of a batch. Needs `pip install "ray[data]"`."""

from pathlib import Path

import ray
from setting import MODEL, mixed, trusted

from trl_bilevel import RowScorer, learn_weights

# Learned once, on a sample of the corpus. On a cluster, keep it where every worker reads it.
FOLDER = str(Path("scorer").resolve())
learn_weights(MODEL, mixed, trusted).scorer.save(FOLDER)


class Weigh:
    """One worker: it loads the model once, and adds `data_weight` to each batch."""

    def __init__(self, folder: str):
        self.scorer = RowScorer.load(folder)

    def __call__(self, batch):
        return self.scorer(batch)


rows = ray.data.from_items(mixed.to_list())
weighed = rows.map_batches(Weigh, fn_constructor_args=[FOLDER], concurrency=2, batch_size=64).to_pandas()
print(f"{len(weighed)} rows, mean weight {weighed['data_weight'].mean():.2f}")
