"""Cost of selection against rows, trusted rows, LoRA rank and length of rows, as `trl_bilevel.planning` computes it.

`python -m benchmarks.report` makes the table and the plot. The formulas are held to counted FLOPs by `tests/planning`.
"""

import tempfile
from pathlib import Path

from peft import LoraConfig

from trl_bilevel import BilevelSFTConfig
from trl_bilevel.planning.shapes import find_config, model_shape, run_shape
from trl_bilevel.planning.work import estimate_work

DOCS = Path(__file__).parent.parent / "docs"
MODEL = "SmolLM2-135M"
# One is changed at a time; the others are these.
BASE = {"training_rows": 10_000, "validation_rows": 32, "rank": 16, "tokens": 256}
VARIED = {
    "training_rows": ("training rows", (1_000, 10_000, 100_000, 1_000_000, 10_000_000)),
    "validation_rows": ("trusted rows", (32, 128, 512, 1024, 2048)),
    "rank": ("LoRA rank", (4, 16, 64, 128, 256)),
    "tokens": ("tokens of a row", (64, 256, 1024, 2048, 4096)),
}
PRESETS = ("reliable", "balanced", "fast")
TEXT = """## Cost

FLOPs of a two-epoch run over plain SFT's, as the planner computes them (`trl-bilevel plan`; `tests/planning` holds its
formulas to counted figures): {model} with LoRA on all linear layers, gradient checkpointing, batches of 8 rows;
{rows:,} rows of {tokens} tokens, {trusted} trusted rows and rank {rank} unless the line says otherwise. Wall time on a
GPU has not been measured with this default.

| settings | changed | | | | | |
|---|---|---|---|---|---|---|
{table}

![Cost at scale](cost_scale.png)

Each row is read once through half of the layers, whatever the training does; at most 2,048 rows are read twice.
Memory is 8 bytes per row.
"""


def ratio(preset: str, **changes: int) -> float:
    """FLOPs of a run over plain SFT's."""
    given = BASE | changes
    config = find_config(MODEL)[0]
    adapters = LoraConfig(r=given["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    args = BilevelSFTConfig(
        tempfile.gettempdir(),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_checkpointing=True,
        use_cpu=True,
        bf16=False,
        max_length=None,
        selector_preset=preset,
    )
    sizes = {name: given[name] for name in ("training_rows", "validation_rows", "tokens")}
    work = estimate_work(model_shape(config, peft_config=adapters), run_shape(args, **sizes))
    assert work["total"] is not None and work["plain"]
    return work["total"] / work["plain"]


def section() -> str:
    """Markdown; writes `docs/cost_scale.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = []
    figure, axes = plt.subplots(1, len(VARIED), figsize=(14, 3.2), sharey=True, constrained_layout=True)
    for axis, (name, (label, values)) in zip(axes, VARIED.items(), strict=True):
        lines.append(f"| | **{label}** | " + " | ".join(f"**{value:,}**" for value in values) + " |")
        for preset in PRESETS:
            found = [ratio(preset, **{name: value}) for value in values]
            axis.plot(values, found, marker="o", label=preset)
            lines.append(f"| {preset} | {label} | " + " | ".join(f"{each:.3f}x" for each in found) + " |")
        axis.axhline(1.1, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel=label)
    axes[0].set_ylabel("FLOPs of a run (SFT = 1)")
    axes[0].legend()
    figure.savefig(DOCS / "cost_scale.png", dpi=110)
    plt.close(figure)
    return TEXT.format(
        model=MODEL,
        rows=BASE["training_rows"],
        tokens=BASE["tokens"],
        trusted=BASE["validation_rows"],
        rank=BASE["rank"],
        table="\n".join(lines),
    )
