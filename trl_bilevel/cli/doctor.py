"""`trl-bilevel doctor`: what will and will not work on this machine, why, and what to do about it.

`trl env` and `accelerate env` list what is there; this says what it means for our runs. Checks change nothing, and
tokens are only reported as set or unset. Each check yields findings by their names in `text/doctor.yaml`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
from collections import namedtuple
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .show import table

GIB = 2**30
EXTRAS = ("report", "demo", "quantization")
# GiB: what a small model, its cache and a few checkpoints take.
LITTLE_DISK = 10

# A line of the report; the remedy is empty if there is nothing to do.
Finding = namedtuple("Finding", ("area", "what", "state", "found", "remedy"), defaults=("",))


@functools.cache
def _findings() -> dict[str, list[str]]:
    return yaml.safe_load(resources.files(__package__).joinpath("text/doctor.yaml").read_text())


def finding(key: str, /, **values: Any) -> Finding:
    """A finding of `text/doctor.yaml`, with values filled in."""
    return Finding(*(text.format(**values) for text in _findings()[key]))


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel doctor",
        epilog="example: trl-bilevel doctor --json",
        description="Checks versions, devices, bitsandbytes, hub, disk and launchers. Nothing is changed, no "
        "token is shown. Exit code 1 if something that a basic run needs is broken.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds to wait for the hub")
    return parser


def run(arguments: list[str]) -> int:
    """Check and show; returns the exit code."""
    options = make_parser().parse_args(arguments)
    findings = list(examine(options.timeout))
    broken, warned = (sum(found.state == state for found in findings) for state in ("broken", "warning"))
    if options.json:
        print(json.dumps({"ok": not broken, "findings": [found._asdict() for found in findings]}, indent=1))
    else:
        table("Findings", ("what", "state", "found", "remedy"), [found[1:] for found in findings])
        good = f"A basic run works here, with {warned} warning(s). Next: trl-bilevel demo"
        print(f"{broken} thing(s) that a basic run needs are broken. Start with their remedies." if broken else good)
    return int(broken > 0)


def examine(timeout: float = 3.0) -> Iterator[Finding]:
    """All findings; a check that fails itself is one of them."""
    for check, *given in ((versions,), (devices,), (bitsandbytes,), (hub, timeout), (disk,), (processes,)):
        try:
            yield from check(*given)
        except Exception as error:
            yield finding("failed check", check=check.__name__, error=type(error).__name__)


def versions() -> Iterator[Finding]:
    """Python and our dependencies against the ranges that the package states."""
    if _version("trl-bilevel") is None:
        yield finding("ours on the path")
        return
    about = metadata.metadata("trl-bilevel")
    yield finding("ours", version=about["Version"])
    version, wanted = platform.python_version(), SpecifierSet(about["Requires-Python"])
    fits = wanted.contains(version, prereleases=True)
    yield finding("python" if fits else "other python", version=version, wanted=wanted)
    for needed in map(Requirement, metadata.requires("trl-bilevel") or []):
        found, marker = _version(needed.name), needed.marker
        fits = found is not None and needed.specifier.contains(found, prereleases=True)
        told = {"name": needed.name, "version": found or "not installed", "wanted": needed.specifier}
        extras = [extra for extra in ("", *EXTRAS) if marker is None or marker.evaluate({"extra": extra})]
        if "" in extras:
            yield finding("dependency" if fits else "other dependency", **told)
        elif extras and not fits:
            yield finding("extra", extra=extras[0], **told)


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
        yield finding("torch", error=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return
    if torch.cuda.is_available():
        yield from gpus(torch)
    else:
        yield finding("hidden gpu" if torch.version.cuda or torch.version.hip else "no gpu")
    if torch.backends.mps.is_available():
        yield finding("mps")


def gpus(torch: Any) -> Iterator[Finding]:
    """What each GPU has."""
    count = torch.cuda.device_count()
    for index in range(count):
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        free, total = (size / GIB for size in torch.cuda.mem_get_info(index))
        memory = f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB free"
        yield finding("gpu" if bf16 else "old gpu", index=index, memory=memory)
    if count > 1 and "LOCAL_RANK" not in os.environ:
        yield finding("several gpus", count=count)


def bitsandbytes() -> Iterator[Finding]:
    """Whether 4-bit and 8-bit work, by quantising a small tensor."""
    version = _version("bitsandbytes")
    if version is None:
        yield finding("no bitsandbytes")
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        values = torch.linspace(-1, 1, 256, device=device)
        error = float((dequantize_4bit(*quantize_4bit(values, quant_type="nf4")) - values).abs().max())
        trouble = "" if error < 0.2 else f"NF4 is off by {error:.2f} of the range"
    except Exception as problem:
        trouble = type(problem).__name__
    yield finding("broken bitsandbytes" if trouble else f"bitsandbytes on {device}", version=version, trouble=trouble)


def hub(timeout: float) -> Iterator[Finding]:
    """Whether models and data sets can be named by hub names; asked as a download would ask."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    flags = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    on = [flag for flag in flags if os.environ.get(flag, "").strip().upper() in ("1", "ON", "YES", "TRUE")]
    host = urlsplit(constants.ENDPOINT).hostname or "the hub"
    if on:
        yield finding("offline", names=" ".join(on))
    else:
        try:
            get_session().head(constants.ENDPOINT, timeout=timeout)
            yield finding("hub", host=host)
        except Exception as error:
            # Its message may hold the address of a proxy, with its password.
            yield finding("no hub", host=host, why=type(error).__name__)
    yield finding("no token" if get_token() is None else "token")


def disk() -> Iterator[Finding]:
    """Space where models, data and output go."""
    from huggingface_hub import constants

    from ..data.assets import cache_folder

    for name, folder, remedy in (
        ("hub cache", Path(constants.HF_HOME), "HF_HOME=/path/with/space"),
        ("our cache", cache_folder(), "TRL_BILEVEL_CACHE=/path/with/space"),
        ("working folder", Path.cwd(), "Set `output_dir` to a folder elsewhere"),
    ):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / GIB
        state = "full disk" if free < LITTLE_DISK else "disk"
        if not os.access(there, os.W_OK):
            state = "read-only disk"
        yield finding(state, name=name, folder=folder, free=free, remedy=remedy)


def processes() -> Iterator[Finding]:
    """Whether a launcher would do what it says."""
    import torch

    yield accelerate_config(torch.cuda.device_count())
    stray = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ]
    if stray and "TORCHELASTIC_RUN_ID" not in os.environ:
        yield finding("stray ranks", names=" ".join(stray))


def accelerate_config(gpus: int) -> Finding:
    """The default file of `accelerate config`, which `accelerate launch` obeys."""
    from accelerate.commands.config.config_args import default_config_file, default_json_config_file

    path = next((Path(name) for name in (default_config_file, default_json_config_file) if Path(name).is_file()), None)
    if path is None:
        return finding("no accelerate config")
    config = yaml.safe_load(path.read_text()) or {}
    # An unquoted NO is YAML for false.
    kind, count = str(config.get("distributed_type") or "NO").upper(), int(config.get("num_processes") or 1)
    trap = ""
    if kind == "MULTI_CPU":
        trap = " on cpus"
    elif kind not in ("NO", "MULTI_GPU"):
        trap = " sharded"
    elif not config.get("use_cpu") and count > max(1, gpus):
        trap = " without gpus"
    return finding(f"accelerate{trap}", path=path, kind=kind, count=count, gpus=gpus)
