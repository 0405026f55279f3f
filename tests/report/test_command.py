"""`trl-bilevel report`, and what the training commands say of it."""

import subprocess
import sys

import pytest

from trl_bilevel.cli.main import main
from trl_bilevel.cli.report import report_line


def test_report_of_a_folder(make_run, capsys, tmp_path):
    folder, uniform = make_run(), make_run("uniform", weighted=False)
    target = tmp_path / "elsewhere" / "r.html"
    arguments = ["report", str(folder), "--baseline", str(uniform), "--output", str(target), "--png"]
    assert main(arguments) == 0
    assert f"Report written to {target}" in capsys.readouterr().out
    assert "<bdi>uniform</bdi>" in target.read_text() and (target.parent / "report_png" / "weights.png").is_file()


@pytest.mark.parametrize(("folder", "message"), [("nowhere", "There is no run folder"), (".", "holds no run")])
def test_a_wrong_folder_is_told(folder, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", folder]) == 1
    error = capsys.readouterr().err
    assert message in error and "output_dir" in error and "Traceback" not in error


def test_a_report_that_fails_does_not_fail_the_run(monkeypatch):
    trainer = type("Trainer", (), {"args": type("Args", (), {"output_dir": "out"})})()
    monkeypatch.setattr("trl_bilevel.report.write_report", lambda *a, **k: 1 / 0)
    assert "ZeroDivisionError" in report_line(trainer)


def test_a_report_needs_no_torch(make_run):
    code = (
        "import sys; from trl_bilevel.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    command = [sys.executable, "-c", code, "report", str(make_run())]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
