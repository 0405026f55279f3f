"""What is uploaded with a model: never the text of rows."""

from concurrent.futures import Future
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects

from trl_bilevel.cli.main import main
from trl_bilevel.data import private

SECRET = "What only the owner of these rows knows"


class FakeHub:
    """Stands in for `HfApi`: chooses the files of a folder as it does, and keeps what would be uploaded."""

    def __init__(self):
        self.files = {}

    def upload_folder(self, *, folder_path, path_in_repo=".", ignore_patterns=None, run_as_future=False, **_):
        folder = Path(folder_path)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            self.files[f"{path_in_repo}/{name}"] = (folder / name).read_bytes()
        job = Future()
        job.set_result(None)
        return job

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})()


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: fake)
    return fake


@pytest.fixture
def words(tmp_path, tiny_model, tokenizer, rows, mixed_rows):
    secret = [row | {"prompt": f"{SECRET} {number}?"} for number, row in enumerate(mixed_rows)]
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_list(secret).to_json(tmp_path / "mixed.jsonl")
    Dataset.from_list(rows[40:60]).to_json(tmp_path / "trusted.jsonl")
    given = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "mixed.jsonl",
        "validation_dataset_name": tmp_path / "trusted.jsonl",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "push_to_hub": True,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def check(hub):
    assert any(name.endswith((".safetensors", ".bin")) for name in hub.files)
    for name, data in hub.files.items():
        assert not any(part in name for part in (*private.IN_ROWS, private.ROWS, private.RECORD)), name
        assert SECRET.encode() not in data, name


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_sft_uploads_no_row(words, hub, tmp_path, strategy):
    """A second run in the same folder, too: it finds what the first one left."""
    words += ["--max_steps", "4", "--save_steps", "2", "--hub_strategy", strategy]
    assert main(["sft", *words]) == 0
    rows = tmp_path / "out" / "_rows"
    assert {path.name for path in rows.iterdir()} == {"weighted.parquet", "report.html"}
    assert SECRET in (rows / "report.html").read_text()
    assert main(["sft", *words]) == 0
    check(hub)


def test_refine_uploads_no_row(words, hub, tmp_path):
    words += ["--num_rounds", "1", "--steps_per_round", "2", "--max_completion_length", "8", "--save_steps", "1"]
    assert main(["refine", *words, "--selection_split", "0.5", "--per_device_train_batch_size", "4"]) == 0
    rows = tmp_path / "out" / "_rows"
    assert {path.name for path in rows.iterdir()} >= {"ledger.jsonl", "responses", "report.html"}
    check(hub)


def test_what_an_earlier_version_left_is_refused(words, hub, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weighted.parquet").write_bytes(b"rows")
    assert main(["sft", *words, "--max_steps", "1"]) == 1
    assert "would upload text of rows: weighted.parquet in" in capsys.readouterr().err
    assert not hub.files


def test_rows_are_not_written_where_they_would_be_uploaded(words, hub, tmp_path, capsys):
    path = ["--weighted_dataset_path", f"{tmp_path}/out/mine.jsonl"]
    assert main(["sft", *words, *path, "--max_steps", "1"]) == 1
    assert "would upload text of rows: mine.jsonl in" in capsys.readouterr().err
    assert not hub.files


def test_places(tmp_path):
    assert private.private_path("out", private.REPORT) == Path("out/_rows/report.html")
    assert private.find_private(tmp_path, private.LEDGER) == tmp_path / "_rows" / "ledger.jsonl"
    (tmp_path / "ledger.jsonl").touch()
    assert private.find_private(tmp_path, private.LEDGER) == tmp_path / "ledger.jsonl"
    with pytest.raises(ValueError, match=r"ledger\.jsonl in"):
        private.check_upload(tmp_path)
    (tmp_path / "_rows").mkdir()
    (tmp_path / "ledger.jsonl").rename(tmp_path / "_rows" / "ledger.jsonl")
    private.check_upload(tmp_path, [tmp_path / "_mine.jsonl", tmp_path.parent / "rows.jsonl"])
