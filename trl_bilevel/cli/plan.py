"""`trl-bilevel plan`: does a run fit, and what would make it fit?

    trl-bilevel plan --config FILE.yaml [--gpu_memory 24] [--model_config Llama-3-8B] [any option of sft]

Takes the config file of `trl-bilevel sft` as it is. No weight is loaded and no GPU is needed: the figures are
computed from the model's config (docs/planning.md has the formulas, and how they compare with measurements).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import BilevelScriptArguments, option, parse, training_parser

if TYPE_CHECKING:
    from ..planning.models import FoundConfig
    from ..planning.shapes import ModelShape

EXAMPLE = "example: trl-bilevel plan --config run.yaml --gpu_memory 24"


@dataclass
class PlanArguments(BilevelScriptArguments):
    """What to plan for. The help of each field says what it is."""

    gpu_memory: float | None = option(None, "Memory of the device in GiB: 24, say.")
    model_config: str | None = option(
        None, "Folder, hub name or built-in name of the model's config. Default: the model."
    )
    device: str | None = option(
        None, "'cuda' or 'cpu'. Default: 'cuda', or 'cpu' if the config says `use_cpu`.", choices=["cuda", "cpu"]
    )
    processes: int = option(1, "Devices that share the work (DDP).")
    tokens: int | None = option(None, "Tokens of the longest row. Default: max_length.")
    mean_tokens: float | None = option(
        None, "Tokens of a row on average, for the work. Default: those of the longest."
    )
    scored_tokens: float | None = option(
        None, "Those of them that the loss counts, for the work of choosing. Default: all."
    )
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

    return training_parser("plan", EXAMPLE, PlanArguments, PlannedConfig)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Compute and show."""
    from trl import get_peft_config

    from ..planning.advice import savings, way_to_fit
    from ..planning.memory import estimate_memory
    from ..planning.models import find_config, model_shape
    from ..planning.settings import quantisation_of, run_shape
    from ..planning.work import estimate_work

    name = script_args.model_config or model_args.model_name_or_path
    if name is None:
        raise ValueError("Give the model: `model_name_or_path`, or `model_config` (folder, hub or built-in name).")
    found = find_config(name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code)
    quantisation = quantisation_of(model_args)
    peft_config = get_peft_config(model_args)
    if quantisation is not None and peft_config is None:
        raise ValueError("A quantised model can only be trained with adapters: set `use_peft: true`.")
    dtype = model_args.dtype or "float32"
    model = model_shape(found.config, dtype=dtype, peft_config=peft_config, quantised=quantisation is not None)
    run = run_shape(
        training_args,
        device=script_args.device or ("cpu" if training_args.wants_cpu else "cuda"),
        tokens=script_args.tokens,
        processes=script_args.processes,
        training_rows=script_args.training_rows or _count_rows(script_args),
        validation_rows=script_args.validation_rows,
        mean_tokens=script_args.mean_tokens,
        scored_tokens=script_args.scored_tokens,
        quantisation=quantisation,
        attention=model_args.attn_implementation or "sdpa",
        dropout=model_args.lora_dropout if peft_config is not None else 0.0,
    )
    plan, work = estimate_memory(model, run), estimate_work(model, run)
    adapted = None if peft_config is not None else _with_adapters(found, dtype)
    report = {
        "model": {**asdict(model), "name": name, "config_from": found.source},
        "run": asdict(run),
        "gpu_memory": script_args.gpu_memory,
        "fits": None if script_args.gpu_memory is None else plan.fits(script_args.gpu_memory),
        "total_bytes": plan.total_bytes,
        "tensor_bytes": plan.tensor_bytes,
        "reserve_bytes": plan.reserve,
        "host_bytes": plan.host_bytes,
        "peak": plan.peak.name,
        "moments": [{"name": m.name, "bytes": m.total, "parts": m.parts} for m in plan.moments],
        "savings": [_saving(saving) for saving in savings(model, run, adapted)],
        "way_to_fit": None,
        "work": {**asdict(work), "total": work.total},
        "notes": [*_source_note(found, name), *plan.notes],
    }
    if script_args.gpu_memory is not None:
        way = way_to_fit(model, run, script_args.gpu_memory, adapted)
        report["way_to_fit"] = None if way is None else [_saving(saving) for saving in way]
    if script_args.json:
        print(json.dumps(report, indent=1))
    else:
        from .plan_tables import show

        show(report, plan, model, run)


def _count_rows(script_args: Any) -> int | None:
    from ..data.loading import FILE_FORMATS, load_rows

    name = script_args.dataset_name
    if not name or Path(name).suffix not in FILE_FORMATS or not Path(name).is_file():
        return None
    return len(load_rows(name, split=script_args.dataset_train_split))


def _with_adapters(found: FoundConfig, dtype: str) -> ModelShape:
    from peft import LoraConfig

    from ..planning.models import model_shape

    adapters = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return model_shape(found.config, dtype=dtype, peft_config=adapters)


def _saving(saving: Any) -> dict[str, Any]:
    return {"name": saving.name, "settings": saving.settings, "saves_bytes": saving.saves, "price": saving.price}


def _source_note(found: FoundConfig, name: str) -> list[str]:
    if found.source != "table":
        return []
    from ..planning.models import known_name

    return [
        f"The numbers of {known_name(name)} are those built in here: the model's own config was not read. Give its "
        "folder by `model_config`, or a hub that can be reached, to be sure."
    ]


def run(arguments: list[str]) -> None:
    """Parse, compute, show."""
    try:
        parts = parse(make_parser(), arguments)
    except ValueError as error:
        if "--num_rounds" not in str(error):
            raise
        raise ValueError(
            "This is a config of `trl-bilevel refine`; only the offline run is planned. Plan the file of the run that "
            "the rounds go on from. What generation adds is in docs/recipes.md, 'Memory, as the headers compute it'."
        ) from error
    main(*parts)
