"""The best rows as a file for other tools.

The same on the command line: `trl-bilevel rank mixed.jsonl --trusted trusted.jsonl --output ranked.parquet`, then
`trl-bilevel export ranked.parquet --top-k 20 --output best.jsonl`.
"""

from datasets import Dataset
from setting import MODEL, mixed, trusted

from trl_bilevel import RowWeights, learn_weights

weights = learn_weights(MODEL, mixed, trusted)
weights.save("weights")  # no text of a row
again = RowWeights.load("weights", mixed)
again.to_dataset(top_k=20).to_json("best.jsonl")  # with sample_id, data_weight, data_rank

best = Dataset.from_json("best.jsonl")
print(f"the best {len(best)} of {len(mixed)} rows; the last of them weighs {min(best['data_weight']):.2f}")
