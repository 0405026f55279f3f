"""The checks of `trl-bilevel doctor`. Each yields findings; none changes anything or prints a secret."""

from __future__ import annotations

import os
import platform
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..extras import what_to_install

GIB = 2**30
DISTRIBUTION = "trl-bilevel"
EXTRAS = ("report", "demo", "quantization")
# What a small model, its cache and a few checkpoints take.
LITTLE_DISK = 10
ON_CPU = "On a CPU, set `use_cpu: true` and `bf16: false` in the config file"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        area, what (`str`): where it belongs, and what was looked at.
        state (`str`): `"ok"`, `"note"` (an option that is not there), `"warning"`, or `"broken"`: a basic run fails.
        found (`str`): what was found, and what follows from it.
        remedy (`str`): what to do; empty if there is nothing to do.
    """

    area: str
    what: str
    state: str
    found: str
    remedy: str = ""


def versions() -> Iterator[Finding]:
    """Python and our dependencies against the ranges that the package states."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata.metadata(DISTRIBUTION)
        requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        remedy = "pip install -e . in its folder"
        yield Finding("versions", DISTRIBUTION, "warning", "not installed, only on the path", remedy)
        return
    yield Finding("versions", DISTRIBUTION, "ok", str(about["Version"]))
    python, wanted = platform.python_version(), SpecifierSet(about["Requires-Python"] or "")
    fine = wanted.contains(python, prereleases=True)
    remedy = "" if fine else f"Make a virtual environment with Python {wanted}"
    yield Finding("versions", "Python", "ok" if fine else "broken", f"{python} (wanted: {wanted})", remedy)
    for requirement in requirements:
        name, found, marker = requirement.name, _version(requirement.name), requirement.marker
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        extra = next((extra for extra in EXTRAS if marker is not None and marker.evaluate({"extra": extra})), None)
        if marker is None or marker.evaluate({"extra": ""}):
            text = f"{found or 'not installed'} (wanted: {requirement.specifier or 'any'})"
            remedy = "" if fits else f"pip install '{name}{requirement.specifier}'"
            yield Finding("versions", name, "ok" if fits else "broken", text, remedy)
        elif extra is not None and not fits:
            text = f"not installed or not {requirement.specifier}: only the extra {extra!r} needs it"
            yield Finding("versions", name, "note", text, f"pip install '{DISTRIBUTION}[{extra}]'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """What torch can compute on: memory, bf16, and whether TRL would refuse."""
    try:
        import torch
    except Exception as error:
        text = f"does not import: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        yield Finding("device", "torch", "broken", text, "Install torch anew: https://pytorch.org/get-started")
        return
    if torch.cuda.is_available():
        yield from _gpus(torch)
    elif torch.version.cuda is not None or torch.version.hip is not None:
        text = "torch is built for GPUs, and sees none"
        yield Finding("device", "GPU", "warning", text, "Look at `nvidia-smi` (driver) and CUDA_VISIBLE_DEVICES")
    else:
        text = "this torch is a CPU build: 7B models are out of reach"
        yield Finding("device", "GPU", "note", text, f"With a GPU, install torch for it. {ON_CPU}")
    if torch.backends.mps.is_available():
        text = "MPS is there; nothing of ours was tried on it"
        yield Finding("device", "Apple GPU", "note", text, "Try `use_cpu: true` if a run fails; no bitsandbytes")
    yield _cpu(torch)


def _gpus(torch: Any) -> Iterator[Finding]:
    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(index)
        text = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {'' if bf16 else 'no '}bf16"
        remedy = "" if bf16 else "Set `fp16: true` and `bf16: false`"
        if free < 0.8 * total:
            remedy = "Other programs use this GPU: see `nvidia-smi`. " + remedy
        yield Finding("device", f"GPU {index}", "ok" if not remedy else "warning", text, remedy.strip())
    if count > 1 and "LOCAL_RANK" not in os.environ:
        text = f"{count} GPUs are visible: TRL refuses to train on them in one process"
        remedy = "accelerate launch -m trl_bilevel.cli.sft ..., or CUDA_VISIBLE_DEVICES=0"
        yield Finding("device", "several GPUs", "warning", text, remedy)


def _cpu(torch: Any) -> Finding:
    try:
        import psutil
    except ImportError as error:
        text = f"{os.cpu_count()} cores; its memory could not be looked at"
        return Finding("device", "CPU", "note", text, what_to_install(error) or "")
    memory = psutil.virtual_memory()
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    text = (
        f"{os.cpu_count()} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, "
        f"{'fast' if fast else 'slow'} bf16"
    )
    short = memory.available < 3 * GIB
    remedy = "The demo takes about 3 GiB: close other programs" if short else ""
    return Finding("device", "CPU", "warning" if short else "ok", text, remedy)


def bitsandbytes() -> Iterator[Finding]:
    """Whether 4-bit and 8-bit work, by quantising a small tensor."""
    if find_spec("bitsandbytes") is None:
        text = "not installed: no `load_in_4bit`, `load_in_8bit`, 8-bit or paged optimizers; all else works"
        yield Finding("libraries", "bitsandbytes", "note", text, f"pip install '{DISTRIBUTION}[quantization]'")
        return
    found = _version("bitsandbytes")
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        values = torch.linspace(-1, 1, 256, device=device)
        error = float((dequantize_4bit(*quantize_4bit(values, quant_type="nf4")) - values).abs().max())
        trouble = "" if error < 0.2 else f"it quantises wrongly here (NF4 is off by {error:.2f} of the range)"
    except Exception as problem:
        trouble = f"it does not quantise here ({type(problem).__name__})"
    if trouble:
        text = f"{found}, but {trouble}: no 4-bit and 8-bit settings"
        remedy = "python -m bitsandbytes says more; or leave `load_in_4bit` and 8-bit optimizers out"
        yield Finding("libraries", "bitsandbytes", "warning", text, remedy)
        return
    text = f"{found}: 4-bit works on {device}"
    if device == "cpu":
        text += " (slowly; its repacking on CPUs with bf16, which spoils gradients, is switched off by our trainers)"
    yield Finding("libraries", "bitsandbytes", "ok", text)


def vllm() -> Iterator[Finding]:
    """Whether responses can be generated by vLLM, in the range that TRL states."""
    from packaging.requirements import Requirement

    found = _version("vllm")
    ranges = [Requirement(text) for text in metadata.requires("trl") or [] if text.startswith("vllm")]
    wanted = ranges[0].specifier if ranges else None
    if found is None:
        text = "not installed: `trl-bilevel refine` generates with transformers, which is slower"
        remedy = f"On a GPU: pip install 'vllm{wanted or ''}', then `use_vllm: true`"
        yield Finding("libraries", "vLLM", "note", text, remedy)
    elif wanted is not None and not wanted.contains(found, prereleases=True):
        text = f"{found}, TRL wants {wanted}: `use_vllm: true` may fail"
        yield Finding("libraries", "vLLM", "warning", text, f"pip install 'vllm{wanted}', or leave `use_vllm` out")
    else:
        text = f"{found}; was not run with our trainers. With a 4-bit base, merging adapters into it loses them"
        yield Finding("libraries", "vLLM", "ok", text)


def flash_attention() -> Iterator[Finding]:
    """Whether `attn_implementation: flash_attention_2` works."""
    found = _version("flash-attn") or _version("flash_attn")
    if found is None:
        text = "not installed: `attn_implementation: flash_attention_2` fails; the default, sdpa, needs nothing"
        remedy = "Not needed. On Ampere or newer: pip install flash-attn --no-build-isolation"
        yield Finding("libraries", "flash-attn", "note", text, remedy)
        return
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        text = f"{found}, but there is no GPU that it runs on"
        yield Finding("libraries", "flash-attn", "warning", text, "Leave `attn_implementation` out: sdpa is used")
    else:
        yield Finding("libraries", "flash-attn", "ok", found)


def triton() -> Iterator[Finding]:
    """TRL's fused LM head uses it on GPUs."""
    import torch

    if torch.cuda.is_available() and find_spec("triton") is None:
        text = "not installed: TRL's fused LM head is slower, and takes up to 4 GiB more"
        yield Finding("libraries", "Triton", "warning", text, "pip install triton (Linux; it comes with torch)")


def hub(timeout: float) -> Iterator[Finding]:
    """Whether models and data sets can be named by hub names; never waits longer than `timeout` seconds."""
    from huggingface_hub import constants, get_token

    flags = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if _is_on(name)]
    host = urlsplit(constants.ENDPOINT).hostname or "the hub"
    if flags:
        text = f"offline ({', '.join(flags)}): only what is in the cache, and local folders and files"
        yield Finding("hub", "hub", "note", text, f"unset {' '.join(flags)}")
    elif why := unreachable(constants.ENDPOINT, timeout):
        text = f"{host} cannot be reached ({why}): hub names only work from the cache"
        remedy = "Give folders and files; check proxy and HF_ENDPOINT; HF_HUB_OFFLINE=1 saves the waiting"
        yield Finding("hub", "hub", "warning", text, f"{remedy}. `trl-bilevel demo` needs no hub")
    else:
        yield Finding("hub", "hub", "ok", f"{host} answers")
    is_set = get_token() is not None
    remedy = "" if is_set else "hf auth login, for gated models (Llama) and uploads"
    yield Finding("hub", "token", "ok" if is_set else "note", "set" if is_set else "unset", remedy)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")


def unreachable(address: str, timeout: float) -> str:
    """Why a server does not answer; empty if it does. A name server that hangs does not hold it up."""
    outcome: list[str] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=timeout).close()
            outcome.append("")
        except urllib.error.HTTPError:
            # It answers, if only to say no.
            outcome.append("")
        except Exception as error:
            # The message may hold the address of a proxy, with its password.
            outcome.append(type(getattr(error, "reason", error)).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return outcome[0] if outcome else f"no answer in {timeout:g} s"


def disk() -> Iterator[Finding]:
    """Space where models, data and output go."""
    from huggingface_hub import constants

    from ..data.assets import cache_folder

    folders = [
        ("hub cache", Path(constants.HF_HOME), "HF_HOME=/path/with/space"),
        ("our cache", cache_folder(), "TRL_BILEVEL_CACHE=/path/with/space"),
        ("working folder", Path.cwd(), "Set `output_dir` to a folder elsewhere"),
    ]
    for name, folder, remedy in folders:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / GIB
        writable = os.access(there, os.W_OK)
        text = f"{folder}: {free:.0f} GiB free" if writable else f"{folder} cannot be written to"
        fine = writable and free >= LITTLE_DISK
        yield Finding("disk", name, "ok" if fine else "warning", text, "" if fine else remedy)


def processes() -> Iterator[Finding]:
    """Whether a launcher would do what it says."""
    import torch

    if not torch.distributed.is_available():
        text = "torch.distributed is not in this build: one process only"
        yield Finding("processes", "launching", "note", text, "Install an official build of torch")
        return
    yield from accelerate_config(torch.cuda.device_count())
    stray = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ]
    if stray and "TORCHELASTIC_RUN_ID" not in os.environ:
        text = f"{', '.join(stray)} set outside a launcher: a run waits for processes that never come"
        yield Finding("processes", "environment", "warning", text, f"unset {' '.join(stray)}")


def accelerate_config(gpus: int) -> Iterator[Finding]:
    """The default file of `accelerate config`, which `accelerate launch` obeys."""
    import yaml
    from accelerate.commands.config.config_args import default_config_file, default_json_config_file

    path = next((Path(name) for name in (default_config_file, default_json_config_file) if Path(name).is_file()), None)
    on_cpu = "torchrun --nproc_per_node 2 with ACCELERATE_USE_CPU=true"
    if path is None:
        text = "no accelerate config: `accelerate launch` uses all GPUs, or one process on a CPU"
        yield Finding("processes", "accelerate", "ok", text, "" if gpus else f"Several processes on a CPU: {on_cpu}")
        return
    config = yaml.safe_load(path.read_text()) or {}
    # An unquoted NO is YAML for false.
    kind, wanted = str(config.get("distributed_type") or "NO").upper(), int(config.get("num_processes") or 1)
    cpu = bool(config.get("use_cpu"))
    text = f"{path}: {kind}, {wanted} process(es)"
    remedy = ""
    if kind == "MULTI_CPU":
        text += " - which silently runs one process"
        remedy = f"{on_cpu}; or `distributed_type: MULTI_GPU` with `use_cpu: true`"
    elif kind not in ("NO", "MULTI_GPU"):
        text += f" - {kind} is refused where weights are learned; fixed ones were not tried with it (docs/scale.md)"
        remedy = "Use MULTI_GPU (DDP)"
    elif not cpu and wanted > max(1, gpus):
        text += f", but there are {gpus} GPU(s)"
        remedy = "accelerate config, or --num_processes"
    yield Finding("processes", "accelerate", "warning" if remedy else "ok", text, remedy)
