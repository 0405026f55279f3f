"""The command line on tiny files."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset

from tests.errors_table import bad_input, note
from trl_bilevel.cli.main import main
from trl_bilevel.data.loading import load_rows, write_rows

COMMANDS = "Commands"


def bad_command(arguments, *values):
    return bad_input(COMMANDS, f"`trl-bilevel {' '.join(arguments)}`", arguments, *values)


def bad_option(arguments, message):
    return bad_input(COMMANDS, f"`trl-bilevel sft --config run.yaml {' '.join(arguments)}`", arguments, message)


@pytest.fixture
def run_folder(tmp_path, tiny_model, tokenizer, rows, mixed_rows):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_list(mixed_rows).to_json(tmp_path / "mixed.jsonl")
    Dataset.from_list(rows[40:60]).to_parquet(tmp_path / "trusted.parquet")
    (tmp_path / "run.yaml").write_text(
        f"""
model_name_or_path: {tmp_path}/model
dataset_name: {tmp_path}/mixed.jsonl
validation_dataset_name: {tmp_path}/trusted.parquet
output_dir: {tmp_path}/out
max_steps: 3
per_device_train_batch_size: 4
use_peft: true
lora_r: 4
lora_target_modules: all-linear
use_cpu: true
bf16: false
report_to: none
save_strategy: "no"
disable_tqdm: true
"""
    )
    return tmp_path


@pytest.mark.compat
def test_sft_trains_and_export_filters(run_folder, capsys):
    assert main(["sft", "--config", f"{run_folder}/run.yaml", "--max_steps", "4"]) == 0
    assert (run_folder / "out" / "adapter_model.safetensors").is_file()
    table = Dataset.from_parquet(str(run_folder / "out" / "_rows" / "weighted.parquet"))
    assert len(table) == 40 and "data_weight" in table.column_names
    assert "trl-bilevel export" in capsys.readouterr().out
    best = run_folder / "best.jsonl"
    assert main(["export", f"{run_folder}/out", "--top-k", "7", "--output", str(best)]) == 0
    kept = [json.loads(line) for line in best.read_text().splitlines()]
    assert sorted(row["data_rank"] for row in kept) == list(range(7))


def test_streams_train_and_export(run_folder, capsys):
    """Two sources as streams that take turns, a weight for each; their rows are written when asked for."""
    config = (run_folder / "run.yaml").read_text().replace(f"dataset_name: {run_folder}/mixed.jsonl\n", "", 1)
    Dataset.from_list([{"prompt": f"{i}?", "completion": "No."} for i in range(50)]).to_json(run_folder / "lazy.jsonl")
    (run_folder / "stream.yaml").write_text(
        f"""{config}
streaming: true
stream_sample_rows: 64
selector_group_column: source
weighted_dataset_path: {run_folder}/out/_rows/weighted.parquet
datasets:
  - path: {run_folder}/mixed.jsonl
  - path: {run_folder}/lazy.jsonl
"""
    )
    assert main(["sft", "--config", f"{run_folder}/stream.yaml"]) == 0
    rows = Dataset.from_parquet(f"{run_folder}/out/_rows/weighted.parquet")
    assert len(rows) == 90 and len(set(rows["source"])) == 2 and None not in rows["data_weight"]
    best = run_folder / "best.jsonl"
    assert main(["export", f"{run_folder}/out", "--top-k", "40", "--output", str(best)]) == 0
    assert len({json.loads(line)["source"] for line in best.read_text().splitlines()}) == 1
    capsys.readouterr()
    # Nobody asked for a copy of this stream.
    stream = ["--streaming", "True", "--stream_sample_rows", "32", "--output_dir", f"{run_folder}/out2"]
    assert main(["sft", "--config", f"{run_folder}/run.yaml", *stream]) == 0
    assert "Next:" not in capsys.readouterr().out and not (run_folder / "out2" / "_rows" / "weighted.parquet").exists()


@pytest.mark.log_probs
@pytest.mark.compat
def test_refine_goes_on_from_an_sft_run(run_folder, capsys):
    assert main(["sft", "--config", f"{run_folder}/run.yaml"]) == 0
    (run_folder / "refine.yaml").write_text(
        f"""
model_name_or_path: {run_folder}/out
dataset_name: {run_folder}/out/_rows/weighted.parquet
validation_dataset_name: {run_folder}/trusted.parquet
output_dir: {run_folder}/refined
selection_split: 0.5
num_rounds: 2
steps_per_round: 2
per_device_train_batch_size: 4
max_completion_length: 8
use_cpu: true
bf16: false
report_to: none
save_strategy: "no"
disable_tqdm: true
"""
    )
    assert main(["refine", "--config", f"{run_folder}/refine.yaml"]) == 0
    assert (run_folder / "refined" / "adapter_model.safetensors").is_file()
    assert len((run_folder / "refined" / "_rows" / "ledger.jsonl").read_text().splitlines()) == 2
    assert "of 2 rounds kept" in capsys.readouterr().out


@pytest.mark.log_probs
@pytest.mark.compat
def test_mixture_names_its_sources(run_folder):
    (run_folder / "mixture.yaml").write_text(
        (run_folder / "run.yaml").read_text().replace(f"dataset_name: {run_folder}/mixed.jsonl\n", "", 1)
        + f"""
datasets:
  - path: {run_folder}/mixed.jsonl
  - path: {run_folder}/trusted.parquet
validation_loss_weight: 0.2
selector_group_column: source
"""
    )
    with pytest.warns(UserWarning, match="20 of 20 rows"):
        assert main(["sft", f"--config={run_folder}/mixture.yaml"]) == 0
    table = Dataset.from_parquet(str(run_folder / "out" / "_rows" / "weighted.parquet"))
    assert len(set(table["source"])) == 2
    assert len({(s, round(w, 6)) for s, w in zip(table["source"], table["data_weight"], strict=True)}) == 2


@pytest.mark.compat
@pytest.mark.bad_input(COMMANDS, "an unknown key in the file of `--config`")
def test_unknown_yaml_keys_are_errors(run_folder, capsys, request):
    with (run_folder / "run.yaml").open("a") as file:
        file.write("pilot_stepz: 3\n")
    assert main(["sft", "--config", f"{run_folder}/run.yaml"]) == 1
    error = capsys.readouterr().err
    assert "pilot_stepz" in error
    note(request, "exit 1", error)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage"),
        (["--help"], 0, "commands:"),
        bad_command(["dance"], 2, "unknown command 'dance'"),
        bad_command(["prepare", "quality"], 2, "`python -m recipes.prepare` in a clone"),
        (["--version"], 0, "trl-bilevel 0."),
        bad_command(["export", "nowhere", "--output", "x.jsonl"], 1, "no weighted data set"),
        bad_command(["demo", "--arms", "magic"], 1, "Unknown arm"),
        bad_command(["sft", "--output_dir", "x", "--use_cpu", "True", "--bf16", "False"], 1, "Give the training rows"),
    ],
)
def test_exit_codes_and_messages(arguments, code, message, capsys, request):
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
    if request.node.get_closest_marker("bad_input"):
        note(request, f"exit {code}", captured.err)


def test_accelerate_launch(run_folder):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--mixed_precision", "no", "-m", "trl_bilevel.cli.sft", "--config", f"{run_folder}/run.yaml"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run_folder / "out" / "_rows" / "weighted.parquet").is_file()


@pytest.mark.parametrize("folder", [False, True])
def test_a_slice_of_local_rows(folder, run_folder, rows):
    name = f"{run_folder}/mixed.jsonl"
    if folder:
        name = f"{run_folder}/saved"
        Dataset.from_list(rows[:40]).save_to_disk(name)
    assert len(load_rows(name, split="train")) == len(load_rows(name, split="test")) == 40
    assert load_rows(name, split="train[5:20]")["prompt"][:] == [row["prompt"] for row in rows[5:20]]
    assert len(load_rows(name, split="train[:50%]")) == 20
    with pytest.raises(ValueError, match="has no split 'dev'"):
        load_rows(name, split="dev")


@pytest.mark.compat
def test_resume_from_the_newest_checkpoint(run_folder):
    saving = ["sft", "--config", f"{run_folder}/run.yaml", "--save_strategy", "steps", "--save_steps", "2"]
    assert main([*saving, "--max_steps", "2"]) == 0
    assert main([*saving, "--max_steps", "4", "--resume_from_checkpoint", "True"]) == 0
    assert (run_folder / "out" / "checkpoint-4").is_dir()


def test_weighted_rows_are_written_as_their_name_says(run_folder):
    common = ["sft", "--config", f"{run_folder}/run.yaml", "--max_steps", "1", "--weighted_dataset_path"]
    assert main([*common, f"{run_folder}/w.jsonl"]) == 0
    assert len((run_folder / "w.jsonl").read_text().splitlines()) == 40
    assert json.loads((run_folder / "w.jsonl").read_text().splitlines()[0])["data_weight"] >= 0


def test_csv_files_keep_their_texts(tmp_path):
    """What pandas would take for a missing value is an answer; a weight may be missing, and numbers stay numbers."""
    said = ["None", "NA", "null", "nan", "N/A", "", "7", "#N/A"]
    rows = [
        {"prompt": str(n), "completion": text, "kind": text, "score": n + 0.5, "data_weight": None if n < 2 else 1.0}
        for n, text in enumerate(said)
    ]
    write_rows(Dataset.from_list(rows), tmp_path / "a.csv")
    back = load_rows(f"{tmp_path}/a.csv")
    assert back.to_list() == rows and back.features["score"].dtype == "float64"
    # Answers that are all numbers are texts as well; a number may be missing in a column of numbers.
    (tmp_path / "b.csv").write_text("prompt,completion,score\n1+1,2,\n2+2,4,5\n,,6\n")
    back = load_rows(f"{tmp_path}/b.csv")
    assert back["prompt"][:] == ["1+1", "2+2", ""] and back["completion"][:] == ["2", "4", ""]
    assert back["score"][:] == [None, 5, 6]
    assert len(list(load_rows(f"{tmp_path}/b.csv", streaming=True))) == 3
    # Rows are read ten thousand at a time: a later one does not change a column's kind.
    lines = [f"a,{n},{n},1\n" for n in range(11_000)] + ["b,NA,,\n"]
    (tmp_path / "c.csv").write_text("prompt,completion,score,data_weight\n" + "".join(lines))
    back = load_rows(f"{tmp_path}/c.csv")
    assert back[11_000] == {"prompt": "b", "completion": "NA", "score": None, "data_weight": None}


def names_told(folder, rows):
    """How many rows a report holds the text of."""
    page = (folder / "_rows" / "report.html").read_text()
    return sum(row["prompt"].split("`")[1] in page for row in rows)


def test_a_second_run_in_the_same_folder(run_folder, rows, capsys):
    """What the first one left is neither shown nor exported as the second one's."""
    Dataset.from_list(rows[70:110]).to_json(run_folder / "other.jsonl")
    out, sft = run_folder / "out", ["sft", "--config", f"{run_folder}/run.yaml"]
    export = ["export", str(out), "--output", f"{run_folder}/x.jsonl"]
    assert main(sft) == 0 and main(export) == 0
    assert names_told(out, rows[:40]) > 30 and (out / "weights.safetensors").is_file()
    other = ["--dataset_name", f"{run_folder}/other.jsonl", "--weighted_dataset_path", f"{run_folder}/w.jsonl"]
    assert main([*sft, *other]) == 0
    assert (
        names_told(out, rows[:40]) < 5
        and "has other weights than this run" in (out / "_rows" / "report.html").read_text()
    )
    capsys.readouterr()
    assert main(export) == 1
    error = capsys.readouterr().err
    assert "weighted.parquet has other weights than this run" in error and f"rows to {run_folder}/w.jsonl" in error
    assert main(["export", f"{out}/_rows/weighted.parquet", "--output", f"{run_folder}/x.jsonl"]) == 0
    assert main([*sft, *other[:2], "--weight_estimator", "none"]) == 0
    page = (out / "_rows" / "report.html").read_text()
    assert names_told(out, rows[:40]) < 5 and "all rows count the same" in page
    assert not (out / "weights.safetensors").exists() and not (out / "weights.json").exists()
    assert main(export) == 1 and "of which no weights are known" in capsys.readouterr().err


@pytest.mark.bad_input(COMMANDS, "`trl-bilevel sft` with `--weighted_dataset_path w.csv`, rows with messages")
def test_csv_of_chats_is_refused_before_training(run_folder, monkeypatch, capsys, request):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Dataset.from_list([{"messages": chat}] * 40).to_json(run_folder / "chat.jsonl")
    monkeypatch.setattr("trl_bilevel.trainer.bilevel_sft_trainer.BilevelSFTTrainer", None)
    arguments = ["--dataset_name", f"{run_folder}/chat.jsonl", "--weighted_dataset_path", f"{run_folder}/w.csv"]
    assert main(["sft", "--config", f"{run_folder}/run.yaml", *arguments]) == 1
    error = capsys.readouterr().err
    assert "cannot hold the columns ['messages']" in error
    note(request, "exit 1", error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad_option(["--weighted_dataset_path", "w.xlsx"], "files that end in .parquet, .jsonl, .csv, got 'w.xlsx'"),
        bad_option(["--streaming", "true", "--packing", "true"], "not supported with a stream"),
        bad_option(["--test_split_size", "0.5"], "`test_split_size` is not supported"),
        bad_option(["--dataset_name", "FOLDER/empty.jsonl"], "Could not read the data file"),
        bad_option(["--dataset_name", "FOLDER/broken.jsonl"], "Could not read the data file"),
        bad_option(["--dataset_name", "FOLDER/odd.jsonl"], "columns ['question', 'answer'], in which no text format"),
        bad_option(["--dataset_train_split", "dev"], "has no split 'dev'"),
    ],
)
def test_mistakes_are_told_without_traceback(arguments, message, run_folder, capsys, request):
    (run_folder / "empty.jsonl").write_text("")
    (run_folder / "broken.jsonl").write_text('{"prompt": ')
    (run_folder / "odd.jsonl").write_text(40 * '{"question": "a", "answer": "b"}\n')
    arguments = [word.replace("FOLDER", str(run_folder)) for word in arguments]
    assert main(["sft", "--config", f"{run_folder}/run.yaml", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    note(request, "exit 1", error)


@pytest.mark.bad_input(COMMANDS, "`trl-bilevel export` of a table without weights")
def test_export_of_another_table(run_folder, capsys, request):
    assert main(["export", f"{run_folder}/trusted.parquet", "--output", f"{run_folder}/x.jsonl"]) == 1
    error = capsys.readouterr().err
    assert "has no column data_weight" in error
    note(request, "exit 1", error)
