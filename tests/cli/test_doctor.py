"""`trl-bilevel doctor`: findings, exit codes, and nothing that should stay secret."""

import json
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from trl_bilevel.cli import doctor
from trl_bilevel.cli.main import main

STATES = {"ok", "note", "warning", "broken"}


@pytest.fixture(autouse=True)
def quiet_home(monkeypatch, tmp_path):
    """No accelerate config, no token of whoever runs the tests, no hub."""
    from accelerate.commands.config import config_args
    from huggingface_hub import constants

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr(config_args, "default_json_config_file", str(tmp_path / "none.json"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def found(findings, what):
    return next(finding for finding in findings if finding.what == what)


def pretend(monkeypatch, **versions):
    real = metadata.version

    def version(name):
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_everything_is_examined_and_each_trouble_has_a_remedy(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert {f["area"] for f in report["findings"]} == {"versions", "device", "libraries", "hub", "disk", "processes"}
    for finding in report["findings"]:
        assert finding["state"] in STATES and "could not be checked" not in finding["found"]
        assert finding["remedy"] or finding["state"] == "ok"


def test_table(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "A basic run works here" in shown and "transformers" in shown.replace("…", "ers")


@pytest.mark.parametrize(("version", "text"), [("1.11.0", "1.11.0 (wanted: "), (None, "not installed (wanted: ")])
def test_dependency_out_of_range_is_broken(version, text, monkeypatch, capsys):
    pretend(monkeypatch, trl=version)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (broken,) = (finding for finding in report["findings"] if finding["state"] == "broken")
    assert (
        broken["what"] == "trl"
        and broken["found"].startswith(text)
        and broken["remedy"].startswith("pip install 'trl")
    )
    assert main(["doctor"]) == 1
    assert "1 thing(s) that a basic run needs are broken" in capsys.readouterr().out


def test_old_python_is_broken(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert found(doctor.versions(), "Python").state == "broken"


def test_package_of_an_extra_is_only_a_note(monkeypatch):
    pretend(monkeypatch, gguf=None)
    finding = found(doctor.versions(), "gguf")
    assert finding.state == "note" and finding.remedy == "pip install 'trl-bilevel[demo]'"


def test_check_that_fails_is_reported(monkeypatch):
    def fails():
        raise RuntimeError("secret")

    monkeypatch.setattr(doctor, "devices", fails)
    finding = found(doctor.examine(), "fails")
    assert finding.state == "warning" and "RuntimeError" in finding.found and "secret" not in finding.found


def test_tokens_are_never_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    for options in ([], ["--json"]):
        main(["doctor", *options])
        captured = capsys.readouterr()
        assert "hf_abcdefgh" not in captured.out + captured.err
    finding = found(doctor.hub(1.0), "token")
    assert (finding.state, finding.found) == ("ok", "set")


def test_without_a_token():
    assert found(doctor.hub(1.0), "token").found == "unset"


def online(monkeypatch, answer):
    """What is found if the hub gives this answer, or raises it."""

    class Session:
        def head(self, address, timeout):
            assert timeout == 0.2 and address.startswith("https://")
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    return found(doctor.hub(0.2), "hub")


def test_hub_that_never_answers(monkeypatch):
    finding = online(monkeypatch, TimeoutError())
    assert finding.state == "warning" and "TimeoutError" in finding.found


def test_hub_that_says_no_is_there(monkeypatch):
    assert online(monkeypatch, SimpleNamespace(status_code=403)).state == "ok"


def test_password_of_a_proxy_is_not_shown(monkeypatch):
    finding = online(monkeypatch, OSError("http://user:password@proxy"))
    assert finding.state == "warning" and "OSError" in finding.found and "password" not in finding.found


def test_offline_flag_is_named(monkeypatch):
    def never():
        raise AssertionError("asked the hub although offline")

    monkeypatch.setattr("huggingface_hub.utils.get_session", never)
    finding = found(doctor.hub(1.0), "hub")
    assert finding.state == "note" and finding.remedy == "unset HF_HUB_OFFLINE"


@pytest.mark.parametrize(
    ("config", "state", "text"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true", "warning", "silently runs one process"),
        ("distributed_type: FSDP\nnum_processes: 2", "warning", "is refused where weights are learned"),
        ("distributed_type: DEEPSPEED\nnum_processes: 2", "warning", "is refused where weights are learned"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2", "warning", "but there are 0 GPU(s)"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true", "ok", "MULTI_GPU, 2"),
        ("distributed_type: 'NO'\nnum_processes: 1", "ok", "NO, 1"),
        ("distributed_type: NO\nnum_processes: 1", "ok", "NO, 1"),
        ("", "ok", "NO, 1"),
    ],
)
def test_traps_of_accelerate_configs(config, state, text, tmp_path):
    (tmp_path / "none.yaml").write_text(config)
    finding = doctor.accelerate_config(gpus=0)
    assert finding.state == state and text in finding.found


def test_rank_outside_a_launcher(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    finding = found(doctor.processes(), "environment")
    assert finding.state == "warning" and finding.remedy == "unset WORLD_SIZE"


def test_bitsandbytes_that_is_missing(monkeypatch):
    pretend(monkeypatch, bitsandbytes=None)
    (finding,) = doctor.bitsandbytes()
    assert finding.state == "note" and "pip install" in finding.remedy


def test_bitsandbytes_that_does_not_work(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(functional, "quantize_4bit", fails)
    (finding,) = doctor.bitsandbytes()
    assert finding.state == "warning" and "does not quantise here" in finding.found


def test_full_disk(monkeypatch):
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert {finding.state for finding in doctor.disk()} == {"warning"}


def test_folder_that_cannot_be_written_to(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert all("cannot be written to" in finding.found for finding in doctor.disk())


def test_several_gpus_in_one_process(monkeypatch):
    import torch

    class Cuda:
        device_count = staticmethod(lambda: 2)
        mem_get_info = staticmethod(lambda index: (20 * 2**30, 24 * 2**30))
        device = staticmethod(lambda index: torch.no_grad())
        is_bf16_supported = staticmethod(lambda including_emulation: False)
        get_device_name = staticmethod(lambda index: "Card")

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    findings = list(doctor.gpus(type("Torch", (), {"cuda": Cuda})))
    assert [finding.what for finding in findings] == ["GPU 0", "GPU 1", "several GPUs"]
    assert "fp16" in findings[0].remedy and "accelerate launch" in findings[2].remedy


def test_importing_the_command_does_not_import_torch():
    code = "import sys, trl_bilevel.cli.doctor, trl_bilevel.cli.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
