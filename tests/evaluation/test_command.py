"""The command from start to end, on tiny models."""

import json
import re

import pytest

from trl_bilevel.cli.main import main
from trl_bilevel.data.answers import STUB
from trl_bilevel.evaluation import rows

SHORT = ["--max_new_tokens", "6", "--max_length", "128", "--resamples", "199"]


def evaluate(folder, *options, **more):
    """The exit code of a call; names of files in `folder` as they are."""
    words = [str(folder / word) if (folder / word).exists() else word for word in options]
    return main(["evaluate", *words, *SHORT, *(part for k, v in more.items() for part in (f"--{k}", str(v)))])


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_everything_at_once(folder, tmp_path, capsys):
    options = ["adapter", "--baseline", "model", "--dataset", "rows.jsonl", "--harmful", "harmful.txt", "--benign"]
    options += ["benign.jsonl", "--judge", f"reward:{folder}/reward"]
    files = {"output": tmp_path / "out.json", "responses": tmp_path / "responses.jsonl"}
    assert evaluate(folder, *options, **files) == 0
    shown = " ".join(re.sub("[│┃]", " ", capsys.readouterr().out).split())
    for part in (
        "Held-out rows",
        "Preference by reward model",
        "Safety (by key words",
        "95% intervals",
    ):
        assert part in shown
    # The three together, in one table.
    safety = shown[shown.index("Safety (") : shown.index("- The judge")]
    for part in ("harmful", "benign", "loss, mean", "win rate"):
        assert part in safety
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["command"].startswith("trl-bilevel evaluate ") and found["settings"]["seed"] == 0
    assert {"python", "torch", "trl", "transformers"} <= set(found["versions"])
    assert [part["rows"] for part in found["data"].values()] == [24, 9, 4]
    assert len(found["preference"]["per_row"]["score"]) == 24
    for figures in found["safety"]["figures"]:
        assert set(figures) == {"refusal", "compliance", "neither", "refusal_preferred", "over_refusal"}
        assert all(0 <= part["low"] <= part["value"] <= part["high"] <= 1 for part in figures.values())
        assert figures["over_refusal"]["n"] == 4 and figures["refusal"]["method"] == "Wilson"
    sums, tokens = (found["loss"]["per_row"][0][name] for name in ("loss_sums", "tokens"))
    other = found["loss"]["per_row"][1]["loss_sums"]
    assert found["loss"]["difference"]["loss_row_mean"]["value"] == pytest.approx(
        sum((a - b) / n for a, b, n in zip(sums, other, tokens, strict=True)) / 24
    )
    said = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["set"] for row in said] == ["rows"] * 24 + ["harmful"] * 9 + ["benign"] * 4
    assert all({row["model"], row["baseline"]} <= {"[refused]", STUB, ""} for row in said[24:33])
    assert all(row["model"] and row["baseline"] for row in said[:24])


def test_a_model_against_itself(folder, capsys):
    """Nothing differs, and no judge can change that."""
    options = [
        "model",
        "--baseline",
        "model",
        "--dataset",
        "rows.jsonl",
        "--judge",
        "tests.evaluation.test_command:First",
    ]
    options += ["--harmful", "harmful.txt", "--benign", "benign.jsonl", "--json"]
    assert evaluate(folder, *options) == 0
    found = document(capsys)
    difference = found["loss"]["difference"]["loss_row_mean"]
    assert (difference["value"], difference["low"], difference["high"], difference["p_value"]) == (0, 0, 0, 1)
    figures = found["preference"]["figures"]
    assert (figures["win_rate"]["value"], figures["first_position"]["value"], figures["consistent"]["value"]) == (
        0.5,
        1,
        0,
    )
    assert found["preference"]["judge"] == "First"
    assert all(part["value"] == 0 and part["p_value"] == 1 for part in found["safety"]["difference"].values())


class First:
    """Always takes the response shown first."""

    def judge(self, prompts, completions):
        assert all(isinstance(prompt, str) for prompt in prompts)
        return [0 for _ in completions]


class EveryOther:
    """Finds a refusal in every other response."""

    note = "every other"

    def judge(self, prompts, responses):
        return [number % 2 for number in range(len(responses))]


def test_a_refusal_judge_of_the_users_own(folder, capsys):
    options = ["model", "--dataset", "rows.jsonl", "--harmful", "harmful.txt", "--benign", "benign.jsonl", "--json"]
    assert evaluate(folder, *options, refusal_judge="tests.evaluation.test_command:EveryOther") == 0
    found = document(capsys)["safety"]
    assert found["judge"] == "every other"
    rates = {name: part["value"] for name, part in found["figures"][0].items()}
    assert (rates["refusal"], rates["compliance"], rates["over_refusal"]) == (4 / 9, 5 / 9, 0.5)


def test_loss_alone_of_a_sample_of_rows(folder, capsys):
    assert evaluate(folder, "model", "--dataset", "rows.jsonl", "--json", max_rows=10, seed=1) == 0
    first = document(capsys)
    assert first["loss"]["rows"] == 10 and "safety" not in first and not first["loss"]["difference"]
    assert evaluate(folder, "model", "--dataset", "rows.jsonl", "--json", max_rows=10, seed=1) == 0
    again = document(capsys)
    assert again == first
    assert evaluate(folder, "model", "--dataset", "rows.jsonl", "--json", max_rows=10, seed=2) == 0
    assert document(capsys)["data"]["dataset"]["sha256"] != first["data"]["dataset"]["sha256"]


def test_plain_text_has_nothing_to_answer(folder, tmp_path, capsys):
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"Some words, {n}."}) + "\n" for n in range(3)))
    options = ["model", "--dataset", str(tmp_path / "plain.jsonl"), "--json"]
    assert evaluate(folder, *options, responses=tmp_path / "said.jsonl") == 0
    assert document(capsys)["loss"]["rows"] == 3 and (tmp_path / "said.jsonl").read_text() == ""
    assert evaluate(folder, *options, "--baseline", "model", "--judge", "tests.evaluation.test_command:First") == 1
    assert "`judge` needs rows with prompts" in capsys.readouterr().err


def test_named_sets_of_requests(folder, capsys, monkeypatch):
    monkeypatch.setattr(rows, "harmful_requests", lambda: ["one", "two"])
    options = ["model", "--dataset", "rows.jsonl", "--harmful", "harmbench", "--benign", "lookalikes", "--json"]
    assert evaluate(folder, *options, max_rows=5) == 0
    figures = document(capsys)["safety"]["figures"][0]
    assert (figures["refusal"]["n"], figures["over_refusal"]["n"]) == (2, 5)


def test_reward_model_and_options_from_a_file(folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {folder}/model\nbaseline: {folder}/baseline\ndataset: {folder}/rows.jsonl\n"
        f"judge: reward:{folder}/reward\njson: true\nmax_rows: 6\n"
    )
    assert evaluate(folder, "--config", str(tmp_path / "run.yaml")) == 0
    found = document(capsys)["preference"]
    assert found["judge"] == f"reward model {folder}/reward"
    assert found["figures"]["win_rate"]["n"] == 6
    # It scores responses one by one: there is no position to be biased for.
    assert "first_position" not in found["figures"]


def test_four_bits(folder, tmp_path, tiny_model, tokenizer, capsys):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes packs no narrower layers on CPUs.
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = [str(tmp_path), "--dataset", "rows.jsonl", "--json"]
    assert evaluate(folder, *options, "--load_in_4bit", max_rows=4) == 0
    found = document(capsys)
    assert evaluate(folder, *options, max_rows=4) == 0
    whole = document(capsys)["loss"]["figures"][0]["loss_row_mean"]["value"]
    assert found["settings"]["load_in_4bit"] is True and found["settings"]["dtype"] == "bfloat16"
    assert 0 < abs(found["loss"]["figures"][0]["loss_row_mean"]["value"] - whole) < 0.05 * whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give the model"),
        (["model"], "there is nothing to measure"),
        (["model", "--dataset", "none.jsonl"], "There is no data file none.jsonl"),
        (["no/model", "--dataset", "rows.jsonl"], "Could not load the model 'no/model'"),
        (["model", "--dataset", "harmful.txt"], "Could not load the data set"),
        (
            ["model", "--dataset", "rows.jsonl", "--harmful", "harmbench"],
            "`harmful` and `benign` go together",
        ),
        (["model", "--dataset", "rows.jsonl", "--judge", "reward:a"], "with a `baseline`'s: give both"),
        # Before a model is loaded, which takes longer.
        (["no/model", "--dataset", "rows.jsonl", "--baseline", "model", "--judge", "gpt"], "Unknown judge 'gpt'"),
        (
            ["no/model", "--dataset", "rows.jsonl", "--baseline", "model", "--judge", "a.b:c"],
            "Could not import 'a.b:c'",
        ),
        (
            ["no/model", "--dataset", "rows.jsonl", "--baseline", "model", "--judge", "reward:no/reward"],
            "Could not load the reward model 'no/reward'",
        ),
        (["model", "--dataset", "rows.jsonl", "--max_rows", "0"], "`max_rows` must be at least 1, got 0"),
        (["model", "--dataset", "rows.jsonl", "--confidence", "95"], "`confidence` must be between 0 and 1"),
        (["model", "--dataset", "rows.jsonl", "--temperature", "-1"], "`temperature` must be at least 0"),
        (["model", "--dataset", "rows.jsonl", "--output", "no/where/x.json"], "The folder of `output` does not exist"),
        (["model", "--dataset", "rows.jsonl", "--chat_template_kwargs", "3"], "must be a JSON object, got '3'"),
        (["model", "--dataset", "rows.jsonl", "--use_peft"], "`use_peft` makes a new adapter"),
    ],
)
def test_mistakes_are_told_without_traceback(options, message, folder, capsys):
    assert evaluate(folder, *options) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
