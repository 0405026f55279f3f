"""Keep what was learned about rows, and weigh rows that come later by the same measure."""

from setting import MODEL, mixed, trusted

from trl_bilevel import RowScorer, learn_weights

today, later = mixed.select(range(len(mixed) // 2)), mixed.select(range(len(mixed) // 2, len(mixed)))
learn_weights(MODEL, today, trusted).scorer.save("scorer")  # a small folder: tensors and JSON, no text of a row

weights = RowScorer.load("scorer").weigh(later)  # one partial forward a row
weights.to_dataset().to_parquet("later.parquet")
print(f"{weights.facts['far_share']:.0%} of the rows are unlike what the scorer was made from")
