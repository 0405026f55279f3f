"""`trl-bilevel export`: what is written for whom, and that nothing is lost on the way there and back."""

import json
import math
import os

import numpy as np
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
from trl_bilevel.data import seal
from trl_bilevel.data.export import weighted_dataset

EXPORT, SELECTORS = "`trl-bilevel export`", "Selectors of SEAL"
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


def test_data_juicer(folder):
    out = folder / "out.jsonl"
    arguments = ["--format", "data-juicer", "--top-k", "3", "--name", "mine", "--output", str(out)]
    assert main(["export", str(folder), *arguments]) == 0
    recipe = yaml.safe_load((folder / "out.data-juicer.yaml").read_text())
    (step,) = recipe["process"]
    assert step == {"topk_specified_field_selector": {"field_key": "data_weight", "topk": 3, "reverse": True}}
    assert recipe["dataset_path"] == str(out) and recipe["text_keys"] == ["prompt", "completion"]
    # Its selector compares numbers: none may be missing.
    assert all(isinstance(row["data_weight"], float) for row in lines(out))


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


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ending", [".pt", ".npy", ".safetensors"])
def test_a_selector_there_and_back(folder, ending, activation):
    file = folder / f"mine_{activation}{ending}"
    assert main(["export", str(folder), "--format", "seal", "--output", str(file)]) == 0
    assert seal.read_selector(file).shape == (6,)
    (folder / "weighted.parquet").rename(folder / "rows.parquet")
    out = folder / "out.parquet"
    assert main(["export", str(folder / "rows.parquet"), "--selector", str(file), "--output", str(out)]) == 0
    back = Dataset.from_parquet(str(out))
    known = torch.nan_to_num(WEIGHTS)
    weights = torch.tensor(back["data_weight"][:])
    torch.testing.assert_close(weights / weights.mean(), known / known.mean(), atol=1e-6, rtol=1e-5)
    assert back["data_rank"][:2] == [3, 0]


def test_weights_are_computed_as_seal_does(tmp_path):
    """Its `TrainableTensorModule`: `N softmax(logits)`, `2 sigmoid(logits)`; its file is the parameter itself."""
    logits = torch.nn.Parameter(torch.tensor([0.1, -1.0, 2.0, 0.1]))
    torch.save(logits, tmp_path / "sft_selection_logits_softmax_ep2.pt")
    read = seal.read_selector(tmp_path / "sft_selection_logits_softmax_ep2.pt")
    assert torch.equal(read, logits.detach()) and not read.requires_grad
    exponentials = [math.exp(value) for value in logits.tolist()]
    expected = [4 * value / sum(exponentials) for value in exponentials]
    assert seal.selector_weights(read).tolist() == pytest.approx(expected)
    expected = [2 / (1 + math.exp(-value)) for value in logits.tolist()]
    assert seal.selector_weights(read, "sigmoid").tolist() == pytest.approx(expected)
    for name in ("a_softmax.pt", "a_softmax_ep2.pt"):
        assert seal.activation_of(name) == "softmax"
    assert seal.activation_of("sigmoid_a.pt") is None


def test_seal_can_read_what_is_written(tmp_path):
    """Its `train_sft.py` loads a parameter of logits, and keeps the rows of the highest."""
    weights = torch.tensor([0.5, 2.0, 0.0, 1.5])
    seal.write_selector(tmp_path / "x_softmax.pt", seal.selector_logits(weights))
    read = torch.load(tmp_path / "x_softmax.pt", weights_only=True)
    assert isinstance(read, torch.nn.Parameter) and read.dtype == torch.float32
    assert read.topk(2).indices.tolist() == [1, 3]
    torch.testing.assert_close(4 * read.detach().softmax(0), weights)


@pytest.mark.parametrize(
    "save",
    [
        bad_input(SELECTORS, "a `.npy` of texts", lambda file: np.save(file, np.array(["a", "b"]))),
        bad_input(SELECTORS, "a `.npz` that is called `.npy`", lambda file: np.savez(file, logits=np.zeros(3))),
    ],
)
def test_another_array(tmp_path, save, refused):
    with open(tmp_path / "x.npy", "wb") as file:
        save(file)
    with refused("holds no selector"):
        seal.read_selector(tmp_path / "x.npy")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "name",
    [
        bad_input(SELECTORS, "a `.pt` with code in it", "bad_softmax.pt"),
        bad_input(SELECTORS, "a `.npy` with code in it", "bad.npy"),
    ],
)
def test_no_code_of_a_selector_file_runs(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), "bad_softmax.pt")
    np.save("bad.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with refused("without running code"):
        seal.read_selector(name)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        bad_input(SELECTORS, "a table", torch.ones(2, 3), r"a tensor \[2, 3\]"),
        bad_input(SELECTORS, "integers", torch.tensor([1, 2]), r"a tensor \[2\]"),
        bad_input(SELECTORS, "a dictionary", {"logits": torch.ones(2)}, "holds dict"),
        bad_input(SELECTORS, "NaN", torch.tensor([0.0, float("nan")]), "NaN or infinite"),
        bad_input(SELECTORS, "minus infinity alone", torch.full((3,), -torch.inf), "gives no row a weight"),
    ],
)
def test_what_is_no_selector(tmp_path, made, message, refused):
    torch.save(made, tmp_path / "x.pt")
    with refused(message):
        seal.read_selector(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "npy", "pt"])
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

    if kind in ("parquet", "jsonl"):
        out = tmp_path / f"out.{kind}"
        assert main(["export", str(tmp_path), "--output", str(out)]) == 0
    else:
        selector = tmp_path / f"selector_softmax.{kind}"
        assert main(["export", str(tmp_path), "--format", "seal", "--output", str(selector)]) == 0
        train_rows.to_json(tmp_path / "rows.jsonl")
        out = tmp_path / "out.jsonl"
        assert main(["export", str(tmp_path / "rows.jsonl"), "--selector", str(selector), "--output", str(out)]) == 0
    rows = load_dataset("json" if out.suffix == ".jsonl" else "parquet", data_files=str(out), split="train")
    assert train(rows) == pytest.approx(train(whole), rel=1e-6)


class FakeHub:
    """Stands in for `HfApi`: keeps what it is given."""

    def __init__(self):
        self.repos, self.files = [], {}

    def create_repo(self, **given):
        self.repos.append(given)

    def upload_folder(self, repo_id, repo_type, folder_path, commit_message):
        assert repo_type == "dataset"
        for root, _, names in os.walk(folder_path):
            for name in names:
                path = os.path.join(root, name)
                with open(path, "rb") as file:
                    self.files[os.path.relpath(path, folder_path)] = file.read()


def test_upload_with_a_data_card(folder, capsys, monkeypatch):
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
    hub = FakeHub()
    export.run([str(folder), "--top-k", "3", "--push-to-hub", "me/chosen", "--private"], api=hub)
    assert "3 of 6 rows uploaded to https://huggingface.co/datasets/me/chosen" in capsys.readouterr().out
    assert hub.repos == [{"repo_id": "me/chosen", "repo_type": "dataset", "private": True, "exist_ok": True}]
    assert set(hub.files) == {"README.md", "data/train.parquet"}
    (folder / "back.parquet").write_bytes(hub.files["data/train.parquet"])
    assert len(Dataset.from_parquet(str(folder / "back.parquet"))) == 3
    text = hub.files["README.md"].decode()
    card = DatasetCard(text)
    (part,) = card.data.configs
    assert part["data_files"] == [{"split": "train", "path": "data/train.parquet"}]
    assert "sample-weights" in card.data.tags
    for words in ("`value_function`", "2511.21056", "| 3.2500 |", "| 2.5000 |", "32, weight 1.00", "@article"):
        assert words in text
    assert "a choice from 6" in text
    assert not any(b"hf_secret" in data for data in hub.files.values())


def test_upload_without_a_record(folder):
    hub = FakeHub()
    export.run([str(folder), "--push-to-hub", "me/all"], api=hub)
    assert hub.repos[0]["private"] is None
    assert "| effective sample size |" in hub.files["README.md"].decode()


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
        bad_export(["--min-weight", "99", "--resample", "5", "--output", "x.jsonl"], "lower `--min-weight`"),
        bad_export(["--min-weight", "nan", "--output", "x.csv"], "must be a number, got nan"),
        bad_export(["--format", "data-juicer", "--resample", "9", "--output", "x.jsonl"], "leave out `--resample`"),
        bad_export(["--format", "seal", "--top-k", "3", "--output", "x.npy"], "SEAL chooses rows itself"),
        bad_export(["--format", "seal", "--output", "x.bin"], "files that end in .pt, .npy, .safetensors, got"),
        bad_export(["--selector", "nowhere.pt", "--output", "x.jsonl"], "no selector file"),
        bad_export(["--push-to-hub", "chosen"], "USER/NAME"),
        bad_export(["--push-to-hub", "me/chosen", "--format", "seal"], "leave out `--format seal`"),
    ],
)
def test_mistakes(folder, arguments, message, capsys, monkeypatch, request):
    monkeypatch.chdir(folder)
    assert main(["export", str(folder), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    note(request, "exit 1", error)
    assert not [path.name for path in folder.iterdir() if path.name.startswith("x.")]


@pytest.mark.bad_input(EXPORT, "`--selector` of another number of rows")
def test_a_selector_of_other_rows(folder, capsys, request):
    seal.write_selector(folder / "s.npy", torch.zeros(5))
    assert main(["export", str(folder), "--selector", str(folder / "s.npy"), "--output", str(folder / "x.jsonl")]) == 1
    error = capsys.readouterr().err
    assert "has 5 logits" in error
    note(request, "exit 1", error)


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
