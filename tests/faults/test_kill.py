"""A run that is killed anywhere and resumed ends as one that was left alone."""

import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.kill_worker import PHASES

ROOT = Path(__file__).parents[2]
# Methods that a run enters once; it is saved first when it is over its first step.
ONCE = {"choose"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PHASES)
def test_killed_in_any_phase_and_resumed(kind, tmp_path):
    command = [sys.executable, "-m", "tests.faults.kill_worker", kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kill["killed"] for kill in kills} == {signal.SIGKILL}, done.stderr[-3000:]
    wrong = [kill for kill in kills if not kill["same"]]
    assert not wrong, f"{wrong}\n{done.stderr[-3000:]}"
    counts = Counter((kill["phase"], kill["when"]) for kill in kills)
    assert set(counts) == set(itertools.product(PHASES[kind], ("entering", "leaving")))
    assert all(count >= 2 or phase in ONCE for (phase, _), count in counts.items())
    assert len(kills) >= 30
