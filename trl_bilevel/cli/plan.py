"""`trl-bilevel plan`: does a run fit, what would make it fit, and what does choosing cost?

Takes the config file of `trl-bilevel sft` as it is. No weight is loaded and no GPU is needed: the figures are
computed from the model's config (docs/planning.md).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .arguments import BilevelScriptArguments, config_parser, option, parse
from .show import table

EXAMPLE = "example: trl-bilevel plan --config run.yaml --gpu_memory 24"
CARDS = (8, 12, 16, 24, 40, 48, 80, 141)
GIB = 2**30


@dataclass
class PlanArguments(BilevelScriptArguments):
    """What to plan for. The help of each field says what it is."""

    gpu_memory: float | None = option(None, "Memory of the device in GiB: 24, say.")
    model_config: str | None = option(None, "Folder, hub name or built-in name of the config. Default: the model.")
    rank: bool = option(False, "Plan `trl-bilevel rank`: rows are weighted, no model is trained.")
    device: str | None = option(None, "Default: 'cuda', or 'cpu' with `use_cpu`.", choices=["cuda", "cpu"])
    processes: int = option(1, "Devices that share the work (DDP).")
    tokens: int | None = option(None, "Tokens of the longest row. Default: max_length.")
    mean_tokens: float | None = option(None, "Tokens of a row on average, for the work. Default: of the longest.")
    scored_tokens: float | None = option(None, "Those of them that the loss counts, for the work. Default: all.")
    training_rows: int | None = option(None, "Training rows. Default: counted, if they are in a local file.")
    validation_rows: int = option(32, "Trusted rows.")
    json: bool = option(False, "Print JSON.")


def make_parser() -> Any:
    """The parser: that of `sft`, and what to plan for."""
    from ..trainer.bilevel_sft_config import BilevelSFTConfig

    @dataclass
    class PlannedConfig(BilevelSFTConfig):
        """The run's config as the machine that runs it will see it: what this one lacks is no error."""

        def __post_init__(self) -> None:
            self.wants_cpu = bool(getattr(self, "use_cpu", False))
            self.use_cpu = True
            super().__post_init__()

    return config_parser("plan", EXAMPLE, PlanArguments, PlannedConfig)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Compute and show."""
    from peft import LoraConfig
    from trl import get_peft_config

    from ..data.loading import FILE_FORMATS, load_rows
    from ..planning.memory import TEXTS, estimate_memory, savings, way_to_fit
    from ..planning.shapes import find_config, model_shape, run_shape
    from ..planning.work import estimate_work

    name, memory = script_args.model_config or model_args.model_name_or_path, script_args.gpu_memory
    if name is None:
        raise ValueError("Give the model: `model_name_or_path`, or `model_config` (folder, hub or built-in name).")
    where = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    config, source = find_config(name, **where)
    quantisation = "8bit" if model_args.load_in_8bit else None
    if model_args.load_in_4bit:
        quantisation = "4bit_nested" if model_args.use_bnb_nested_quant else "4bit"
    adapters = None if script_args.rank else get_peft_config(model_args)
    if quantisation and not adapters and not script_args.rank:
        raise ValueError("A quantised model can only be trained with adapters: set `use_peft: true`.")
    dtype = model_args.dtype or "float32"
    model = model_shape(config, dtype=dtype, peft_config=adapters, quantised=quantisation is not None)
    rows, path = script_args.training_rows, Path(script_args.dataset_name or "")
    if rows is None and path.suffix in FILE_FORMATS and path.is_file():
        rows = len(load_rows(str(path), split=script_args.dataset_train_split))
    same = ("tokens", "processes", "validation_rows", "mean_tokens", "scored_tokens")
    run = run_shape(
        training_args,
        device=script_args.device or ("cpu" if training_args.wants_cpu else "cuda"),
        training_rows=rows,
        quantisation=quantisation,
        attention=model_args.attn_implementation or "sdpa",
        dropout=model_args.lora_dropout if adapters else 0.0,
        trains=not script_args.rank,
        **{field: getattr(script_args, field) for field in same},
    )
    if script_args.rank and not (run.pilots or run.probes):
        raise ValueError(f"`rank` learns weights: `{run.estimator}` does not. Set `weight_estimator: probe`.")
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = model_shape(config, dtype=dtype, peft_config=lora) if run.trains and not adapters else None
    plan = estimate_memory(model, run)
    way = None if memory is None else way_to_fit(model, run, memory, adapted)
    work = estimate_work(model, run)
    notes = {"table": source == "table", "rows": work["total"] is None}
    report = plan._asdict() | {
        "model": asdict(model) | {"name": name, "config_from": source},
        "run": asdict(run),
        "gpu_memory": memory,
        "fits": None if memory is None else plan.fits(memory),
        "moments": [{"name": name, "bytes": sum(m.values()), "parts": m} for name, m in plan.moments.items()],
        "savings": [told for told, *_ in savings(model, run, adapted)],
        "way_to_fit": None if way is None else [told for told, *_ in way],
        "work": work,
        "notes": [TEXTS["notes"][name] for name, applies in notes.items() if applies] + plan.notes,
    }
    if script_args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, plan.moments[plan.peak], TEXTS["work"])


def show(report: dict[str, Any], parts: dict[str, int], labels: dict[str, str]) -> None:
    """One table of memory, of what saves it, and of work; then whether it fits."""
    model, run, work, memory = report["model"], report["run"], report["work"], report["gpu_memory"]
    print(
        f"{model['name']}: {model['parameters'] / 1e9:.2f} billion parameters, "
        f"{model['trainable'] * run['trains'] / 1e6:.1f} M trained. {run['rows']} rows of {run['tokens']} tokens in a "
        f"micro-batch, {run['accumulation']} of them in a step, on {run['processes']} x {run['device']}."
    )
    sizes = parts | {"CUDA context, fragmentation (assumed)": report["reserve_bytes"]}
    sizes |= {"total": report["total_bytes"], "paged, in the host's memory": report["host_bytes"]}
    rows = [(name, f"{size / GIB:.2f} GiB", "") for name, size in sizes.items() if size]
    for saving in report["savings"]:
        name = f"{saving['name']} ({saving['price']})"
        rows.append((name, f"-{saving['saves_bytes'] / GIB:.2f} GiB", _settings([saving])))
    for name, what in labels.items():
        if work[name]:
            share = f"{work[name] / work['plain']:.2f} x plain SFT" if work["plain"] and name != "step" else ""
            rows.append((what, f"{work[name] / 1e15:,.3g} petaFLOPs", share))
    columns = ("what", "computed", "settings")
    table(f"Memory at the peak ({report['peak']}), what saves some, work", columns, rows, right=columns[1:2])
    needed, way = report["total_bytes"] / GIB, report["way_to_fit"]
    if memory is None:
        cards = [f"a device of {card} GiB or more" for card in CARDS if needed <= card]
        print(f"Needs {needed:.1f} GiB: fits {[*cards, 'no single device'][0]}. Give `--gpu_memory` to check one.")
    elif report["fits"]:
        print(f"Fits: {needed:.1f} of {memory:g} GiB.")
    else:
        none = "No combination of these makes it fit: take a smaller model or a larger device."
        print(f"Does not fit: needs {needed:.1f} GiB, the device has {memory:g}.")
        print(f"With these it fits:\n{_settings(way)}" if way else none)
    for note in report["notes"]:
        print(f"Note: {note}")


def _settings(chosen: list[dict[str, Any]]) -> str:
    """As the config file writes them."""
    settings = {name: value for saving in chosen for name, value in saving["settings"].items()}
    return "\n".join(f"{name}: {json.dumps(value).strip(chr(34))}" for name, value in settings.items())


def run(arguments: list[str]) -> None:
    """Parse, compute, show."""
    try:
        parts = parse(make_parser(), arguments)
    except ValueError as error:
        if "--num_rounds" not in str(error):
            raise
        from ..planning.memory import TEXTS

        raise ValueError(TEXTS["refine"]) from error
    main(*parts)
