"""`docs/errors.md`: every bad input that the tests give, and the message that a user gets.

A test of a bad input is marked `bad_input`, with the section of the table and what is bad (`bad_input` below makes
such marks for parametrised tests), and checks the message by the fixture `refused`. Each compares its own message with
the file; `pytest -m bad_input --errors-table=docs/errors.md` writes it anew (`make errors-table`).
"""

import functools
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

import trl_bilevel

FILE = Path(__file__).parents[1] / "docs" / "errors.md"
PACKAGE = Path(trl_bilevel.__file__).parent
PROPERTY = "bad_input"
# Sections of the table that several files share.
DATA = "Data of `BilevelSFTTrainer`"
REFINE_DATA = "Data of `SelfRefineTrainer`"
SUPPORT = "What `BilevelSFTTrainer` does not support"
CHECKPOINTS = "Checkpoints"

CASES = []
FILES = set()
FOUND = {}
HEADER = """# Bad input, and what you are told

Written from the tests' own cases by `make errors-table`; each of these tests compares its message with this file.
Input is refused when the configuration or the trainer is made, before anything is computed, wherever it can be known.
"""


def bad_input(section, what, *values):
    """A case of a parametrised test: values for its arguments, and its row of the table."""
    return pytest.param(*values, marks=pytest.mark.bad_input(section, what), id=re.sub(r"[`\n]", "", what)[:60])


def bad_settings(section, cases):
    """Cases `(settings, message)`: the settings themselves say what is bad."""
    return [bad_input(section, _as_code(settings), settings, message) for settings, message in cases]


def _as_code(settings):
    return ", ".join(f"`{name}={value!r}`" for name, value in settings.items())


def _cell(text):
    return " ".join(text.split()).replace("|", r"\|")


@functools.cache
def table(file=FILE):
    """Rows of a written table: (section, what) -> (kind, message)."""
    found, section = {}, None
    for line in file.read_text().splitlines() if file.is_file() else []:
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith("| Input |"):
            what, kind, message = re.split(r"(?<!\\) \| ", line[2:-2])
            found[section, what] = (kind, message)
    return found


def _settled(request, message):
    """The message without what differs between runs and machines."""
    if "tmp_path" in request.fixturenames:
        message = message.replace(str(request.getfixturevalue("tmp_path")), "FOLDER")
    message = re.sub(r"\b[0-9a-f]{16}\b", "HASH", message)
    return re.sub(r"\b(step |checkpoint-)\d+", r"\1N", message)


def note(request, kind, message):
    """Take a message into the table, or compare it with that of the written one."""
    section, what = request.node.get_closest_marker("bad_input").args
    row = section, _cell(what), kind, _cell(_settled(request, message))
    request.node.user_properties.append((PROPERTY, row))
    if request.config.getoption("errors_table"):
        return
    written = table().get(row[:2])
    assert written == row[2:], f"docs/errors.md says {written}, the message is {row[2:]}: run `make errors-table`."


@pytest.fixture
def refused(request):
    """`with refused(message, error=ValueError):` `pytest.raises` (for a warning, `pytest.warns`) for the table.

    Messages of other libraries' are not put into it.
    """

    @contextmanager
    def check(message, error=ValueError):
        if isinstance(error, type) and issubclass(error, Warning):
            with pytest.warns(error, match=message) as caught:
                yield caught
            note(request, error.__name__, next(str(w.message) for w in caught if re.search(message, str(w.message))))
            return
        with pytest.raises(error, match=message) as caught:
            yield caught
        if PACKAGE in Path(caught.traceback[-1].path).parents:
            note(request, type(caught.value).__name__, str(caught.value))

    return check


def pytest_addoption(parser):
    parser.addoption("--errors-table", metavar="FILE", help="write the messages of bad input to this Markdown file")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Before `-k` and `-m` take some away: which cases there are, and in which order."""
    FILES.update(item.path for item in items)
    for place, item in enumerate(items):
        mark = item.get_closest_marker("bad_input")
        if mark is not None:
            CASES.append((mark.args[0], _cell(mark.args[1])))
            item.user_properties.append(("place", place))


def pytest_runtest_logreport(report):
    """In the process that writes: take in what the tests noted, in whichever process they ran."""
    properties = dict(report.user_properties)
    if report.when == "call" and PROPERTY in properties:
        FOUND[properties["place"]] = properties[PROPERTY]


def pytest_sessionfinish(session, exitstatus):
    target = session.config.getoption("errors_table")
    if target and not hasattr(session.config, "workerinput") and exitstatus == 0:
        write_table(Path(target), [FOUND[place] for place in sorted(FOUND)])


def write_table(file, rows):
    """Rows `(section, what, kind, message)` as Markdown."""
    sections = {}
    for section, *cells in rows:
        sections.setdefault(section, []).append(cells)
    lines = [HEADER]
    for section, entries in sections.items():
        lines += [f"## {section}", "", "| Input | Error | Message |", "|---|---|---|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in entries]
        lines.append("")
    file.write_text("\n".join(lines))
