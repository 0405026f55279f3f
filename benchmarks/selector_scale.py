"""What a selector update costs, and what it holds, at 10 thousand to 10 million rows.

python -m benchmarks.selector_scale        (about a minute; writes benchmarks/results/selector_scale.json)

The sizes alternate within one process, so that whatever else the machine does hits all of them; ratios of medians.
"""

import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.run import machine
from trl_bilevel.core import selector as core

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BATCH = 64
ROUNDS = 400


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    states = {size: core.init_selector(torch.ones(size, dtype=torch.bool)) for size in SIZES}
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(ROUNDS):
        for size, state in states.items():
            index = torch.randint(0, size, (BATCH,), generator=generator)
            scores = torch.randn(BATCH, generator=generator)
            start = time.perf_counter()
            core.sample_weights(state, index)
            core.update_sparse_centred(state, index, scores, learning_rate=0.5, entropy_coef=0.02)
            times[size].append(time.perf_counter() - start)
    medians = {size: statistics.median(values[50:]) for size, values in times.items()}
    held = {
        size: sum(t.numel() * t.element_size() for t in state.tensors().values()) / size
        for size, state in states.items()
    }
    record = {
        "batch": BATCH,
        "rounds": ROUNDS,
        "median_microseconds": {str(k): round(v * 1e6, 1) for k, v in medians.items()},
        "ratio_to_smallest": {str(k): round(v / medians[SIZES[0]], 3) for k, v in medians.items()},
        "bytes_per_row": {str(k): round(v, 4) for k, v in held.items()},
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / "selector_scale.json"
    path.write_text(json.dumps(record, indent=2))
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
