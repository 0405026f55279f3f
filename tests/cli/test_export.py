"""`trl-bilevel export`: what is written for whom, and that nothing is lost on the way there and back."""

import json

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard
from peft import LoraConfig

from tests.conftest import losses
from tests.errors_table import bad_input, note
from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.cli import export
from trl_bilevel.cli.main import main
from trl_bilevel.data.export import weighted_dataset

EXPORT = "`trl-bilevel export`"
WEIGHTS = torch.tensor([0.5, 2.0, float("nan"), 1.0, 0.0, 1.5])


def bad_export(arguments, message):
    return bad_input(EXPORT, f"`{' '.join(arguments)}`", arguments, message)


@pytest.fixture
def folder(tmp_path):
    """A run's folder: six weighted rows, the third of which was never trained on."""
    rows = Dataset.from_list([{"prompt": f"Ask {n}?", "completion": f"Answer {n}."} for n in range(6)])
    weighted_dataset(rows, WEIGHTS).to_parquet(str(tmp_path / "weighted.parquet"))
    return tmp_path


def chats(folder, layout):
    """The same with other columns."""
    rows = []
    for n in range(6):
        ask, answer = {"role": "user", "content": f"Ask {n}?"}, {"role": "assistant", "content": f"Answer {n}."}
        turned = [{"from": "human", "value": f"Ask {n}?"}, {"from": "gpt", "value": f"Answer {n}."}]
        rows.append(
            {
                "chat pairs": {"prompt": [ask], "completion": [answer]},
                "messages": {"messages": [ask, answer]},
                "conversations": {"conversations": turned},
                "text": {"text": f"Answer {n}."},
            }[layout]
        )
    weighted_dataset(Dataset.from_list(rows), WEIGHTS).to_parquet(str(folder / "weighted.parquet"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_rows_and_weights_survive_every_format(folder, ending):
    out = folder / f"out.{ending}"
    assert main(["export", str(folder), "--output", str(out)]) == 0
    rows = load_dataset({"jsonl": "json"}.get(ending, ending), data_files=str(out), split="train")
    assert rows["prompt"][:] == [f"Ask {n}?" for n in (0, 1, 3, 4, 5)]
    assert rows["data_weight"][:] == pytest.approx([0.5, 2.0, 1.0, 0.0, 1.5])
    assert main(["export", str(out), "--top-k", "2", "--output", str(folder / "again.jsonl")]) == 0
    assert [row["sample_id"] for row in lines(folder / "again.jsonl")] == [1, 5]


def test_choices(folder, capsys):
    out = folder / "out.jsonl"
    assert main(["export", str(folder), "--min-weight", "1", "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 3, "of": 6, "files": [str(out)], "hub": None}
    assert [row["sample_id"] for row in lines(out)] == [1, 3, 5]
    assert main(["export", str(folder), "--top-k", "2", "--min-weight", "1.8", "--output", str(out)]) == 0
    assert [row["sample_id"] for row in lines(out)] == [1]


def test_resampled_rows_occur_as_often_as_they_weigh(folder):
    out = folder / "out.jsonl"
    assert main(["export", str(folder), "--resample", "50", "--output", str(out)]) == 0
    drawn = [row["sample_id"] for row in lines(out)]
    assert [drawn.count(n) for n in range(6)] == [5, 20, 0, 10, 0, 15]
    # A weight beside a row that was drawn by it would count twice.
    assert set(lines(out)[0]) == {"prompt", "completion", "sample_id"}
    first = out.read_text()
    assert main(["export", str(folder), "--resample", "50", "--output", str(out)]) == 0
    assert out.read_text() == first
    assert main(["export", str(folder), "--resample", "50", "--seed", "1", "--output", str(out)]) == 0
    assert out.read_text() != first


@pytest.mark.parametrize(
    ("layout", "formatting", "columns"),
    [
        ("pairs", "alpaca", {"prompt": "prompt", "response": "completion"}),
        ("chat pairs", "sharegpt", {"messages": "messages"}),
        ("messages", "sharegpt", {"messages": "messages"}),
        ("conversations", "sharegpt", {"messages": "conversations"}),
        ("text", "alpaca", {"prompt": "text"}),
    ],
)
def test_llama_factory(folder, layout, formatting, columns):
    if layout != "pairs":
        chats(folder, layout)
    (folder / "dataset_info.json").write_text('{"other": {"file_name": "other.json"}}')
    out = folder / "chosen.jsonl"
    assert main(["export", str(folder), "--format", "llama-factory", "--output", str(out)]) == 0
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["other"] == {"file_name": "other.json"}
    entry = info["chosen"]
    assert (entry["file_name"], entry["formatting"], entry["columns"]) == ("chosen.jsonl", formatting, columns)
    row = lines(out)[0]
    assert all(name in row for name in columns.values())
    if "messages" in row:
        tags = entry["tags"]
        said = [(turn[tags["role_tag"]], turn[tags["content_tag"]]) for turn in row["messages"]]
        assert said == [(tags["user_tag"], "Ask 0?"), (tags["assistant_tag"], "Answer 0.")]


@pytest.mark.parametrize("layout", ["pairs", "chat pairs", "messages", "conversations", "text"])
def test_axolotl(folder, layout):
    if layout != "pairs":
        chats(folder, layout)
    out = folder / "out.jsonl"
    assert main(["export", str(folder), "--format", "axolotl", "--top-k", "2", "--output", str(out)]) == 0
    (entry,) = yaml.safe_load((folder / "out.axolotl.yaml").read_text())["datasets"]
    assert entry["path"] == str(out) and entry["ds_type"] == "json"
    row = lines(out)[0]
    if layout == "pairs":
        kind = entry["type"]
        text = kind["no_input_format"].format(instruction=row[kind["field_instruction"]]) + row[kind["field_output"]]
        assert text == "Ask 1?Answer 1."
    else:
        assert entry["type"] == ("completion" if layout == "text" else "chat_template")
        assert entry.get("field", entry.get("field_messages")) in row


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_exported_weights_give_the_same_run(kind, config, tiny_model, tokenizer, train_rows, tmp_path):
    """From a trainer to a file, to the rows of a fixed-weight trainer: the same losses."""
    weights = torch.linspace(0.0, 2.0, len(train_rows))
    whole = weighted_dataset(train_rows, weights)
    whole.to_parquet(str(tmp_path / "weighted.parquet"))

    def train(rows):
        trainer = BilevelSFTTrainer(
            tiny_model(),
            config(weight_estimator="none", max_steps=3),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        trainer.train()
        return losses(trainer)

    out = tmp_path / f"out.{kind}"
    assert main(["export", str(tmp_path), "--output", str(out)]) == 0
    rows = load_dataset("json" if out.suffix == ".jsonl" else "parquet", data_files=str(out), split="train")
    assert train(rows) == pytest.approx(train(whole), rel=1e-6)


@pytest.fixture
def hub(monkeypatch):
    """What would be uploaded: rows with the settings of the repository, then the card."""
    sent = []
    monkeypatch.setattr(Dataset, "push_to_hub", lambda self, repo, **given: sent.append((repo, self, given)))
    monkeypatch.setattr(DatasetCard, "push_to_hub", lambda self, repo: sent.append((repo, str(self))))
    return sent


def test_upload_with_a_data_card(folder, capsys, monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    (folder / "_record").mkdir()
    record = {
        "format": 1,
        "kind": "sft",
        "model": "tiny",
        "settings": {"weight_estimator": "value_function", "pilot_steps": 24, "hub_token": "hf_secretsecretsecret"},
        "data": {"rows": 6, "rows_trained_on": 5, "validation": {"validation": {"rows": 32, "weight": 1.0}}},
        "validation": [{"step": 0, "total": 3.25}, {"step": 9, "total": 2.5}],
        "evaluation": {"losses": [2.0, 3.0]},
    }
    (folder / "_record" / "run.json").write_text(json.dumps(record))
    export.run([str(folder), "--top-k", "3", "--push-to-hub", "me/chosen", "--private"])
    assert "3 of 6 rows uploaded to https://huggingface.co/datasets/me/chosen" in capsys.readouterr().out
    (repo, sent, given), (again, text) = hub
    assert (repo, again, given) == ("me/chosen", "me/chosen", {"split": "train", "private": True})
    assert sent["sample_id"][:] == [1, 3, 5]
    card = DatasetCard(text)
    (part,) = card.data.configs
    assert part["data_files"] == [{"split": "train", "path": "data/train-*"}]
    assert "sample-weights" in card.data.tags
    for words in ("`value_function`", "2511.21056", "| 3.2500 |", "| 2.5000 |", "32, weight 1.00", "@article"):
        assert words in text
    assert "a choice from 6" in text
    assert "hf_secret" not in text


def test_upload_without_a_record(folder, hub):
    export.run([str(folder), "--push-to-hub", "me/all"])
    assert hub[0][2]["private"] is None
    assert "| effective sample size |" in hub[1][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad_export(["--top-k", "0", "--output", "x.jsonl"], "`--top-k` must be at least 1"),
        bad_export(["--resample", "0", "--output", "x.jsonl"], "`--resample` must be at least 1"),
        bad_export(["--output", "nowhere/x.jsonl"], "does not exist"),
        bad_export(["--output", "x.xlsx"], "files that end in"),
        bad_export(["--format", "axolotl", "--output", "x.parquet"], "must end in .jsonl"),
        bad_export(["--format", "llama-factory", "--min-weight", "9", "--output", "x.jsonl"], "No row is left"),
        bad_export(["--min-weight", "99", "--output", "x.parquet"], "the highest weight is 2."),
        bad_export(["--min-weight", "99", "--resample", "5", "--output", "x.jsonl"], "Lower `--min-weight`"),
        bad_export(["--min-weight", "nan", "--output", "x.csv"], "No row is left to write of 6"),
        bad_export(["--push-to-hub", "chosen"], "USER/NAME"),
        bad_export(["--push-to-hub", "me/chosen", "--format", "axolotl"], "leave out `--format axolotl`"),
    ],
)
def test_mistakes(folder, arguments, message, capsys, monkeypatch, request):
    monkeypatch.chdir(folder)
    assert main(["export", str(folder), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    note(request, "exit 1", error)
    assert not [path.name for path in folder.iterdir() if path.name.startswith("x.")]


@pytest.mark.bad_input(EXPORT, "`--output x.csv`, rows with messages")
def test_csv_cannot_hold_messages(folder, capsys, request):
    chats(folder, "messages")
    assert main(["export", str(folder), "--output", str(folder / "x.csv")]) == 1
    error = capsys.readouterr().err
    assert "cannot hold the columns ['messages']" in error
    note(request, "exit 1", error)


@pytest.mark.bad_input(EXPORT, "`--format axolotl`, columns of no known text format")
def test_unknown_columns_for_another_tool(folder, capsys, request):
    rows = Dataset.from_list([{"question": "a", "answer": "b"}] * 6)
    weighted_dataset(rows, WEIGHTS).to_parquet(str(folder / "weighted.parquet"))
    arguments = ["--format", "axolotl", "--output", str(folder / "x.jsonl")]
    assert main(["export", str(folder), *arguments]) == 1
    error = capsys.readouterr().err
    assert "cannot be told to another tool" in error
    note(request, "exit 1", error)


@pytest.mark.bad_input(EXPORT, "`--format llama-factory`, a dataset_info.json of something else")
def test_another_dataset_info_is_not_overwritten(folder, capsys, request):
    (folder / "dataset_info.json").write_text("[1]")
    assert main(["export", str(folder), "--format", "llama-factory", "--output", str(folder / "x.jsonl")]) == 1
    error = capsys.readouterr().err
    note(request, "exit 1", error)
    assert "lists no data sets" in error and (folder / "dataset_info.json").read_text() == "[1]"


@pytest.mark.parametrize("arguments", [[], ["--output", "x.jsonl", "--push-to-hub", "me/x"], ["--format", "xml"]])
def test_wrong_usage(folder, arguments):
    with pytest.raises(SystemExit) as end:
        main(["export", str(folder), *arguments])
    assert end.value.code == 2
