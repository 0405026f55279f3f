"""What importing the package costs on top of `import trl`: `python -m benchmarks.import_time`.

Times are those of `-X importtime` (self times summed, so that the tracing of nested imports counts once), the median
of several fresh interpreters. Nothing is written.
"""

import argparse
import os
import subprocess
import sys
from statistics import median

CASES = {
    "import trl": "import trl",
    "import trl, trl_bilevel": "import trl, trl_bilevel",
    "trl: SFTTrainer, SFTConfig": "from trl import SFTTrainer, SFTConfig",
    "the same, and BilevelSFTTrainer": "from trl import SFTTrainer, SFTConfig\n"
    "from trl_bilevel import BilevelSFTTrainer",
    "trl-bilevel --help": "from trl_bilevel.cli.main import main; main(['--help'])",
    "trl-bilevel export --help": "from trl_bilevel.cli.main import main\ntry: main(['export', '--help'])\n"
    "except SystemExit: pass",
}


def seconds(code: str) -> float:
    """Seconds that imports took in a fresh interpreter that ran `code`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    rows = [
        line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "import time:" in line
    ]
    return sum(int(row[0]) for row in rows if row[0].strip().isdigit()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="interpreters per line (default: 5)")
    repeats = parser.parse_args().repeats
    for code in CASES.values():
        # Compiled files and the disk cache.
        seconds(code)
    # In turns: whatever else the machine does meets all lines alike.
    found = {name: [] for name in CASES}
    for _ in range(repeats):
        for name, code in CASES.items():
            found[name].append(seconds(code))
    times = {name: median(values) for name, values in found.items()}
    for name, value in times.items():
        print(f"{name:35} {value:7.3f} s")
    names = list(CASES)
    print(f"{'trl_bilevel on top of trl':35} {times[names[1]] - times[names[0]]:7.3f} s")
    print(f"{'BilevelSFTTrainer on top of both':35} {times[names[3]] - times[names[2]]:7.3f} s")


if __name__ == "__main__":
    main()
