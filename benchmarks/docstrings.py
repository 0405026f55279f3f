"""Tens of thousands of questions and answers that any machine has: what functions of installed packages do.

The packages are those of the development environment (`constraints.txt`), so the same versions give the same text.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from datasets import Dataset

from trl_bilevel.data.contamination import Exchange, salad, swapped
from trl_bilevel.demo.tasks import END, PROMPT, Task, lazy

STANDARD = "the standard library"
TRUSTED, TEST = 64, 500
DAMAGES = (lazy, swapped, salad)
GOOD_SHARE = 0.25
# A package that trusted rows of another topic are drawn from has so many docstrings at least.
LARGE = 800


def _found(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Names and first paragraphs of the docstrings of a file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    waiting: list[tuple[ast.AST, str]] = [(tree, module)]
    while waiting:
        node, name = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            full = f"{name}.{child.name}"
            waiting.append((child, full))
            text = None if isinstance(child, ast.ClassDef) else ast.get_docstring(child)
            if text:
                yield full, " ".join(text.strip().split("\n\n")[0].split())


@cache
def docstrings() -> dict[str, list[Exchange]]:
    """What functions do, by package, each text once: 6 to 45 words."""
    libraries, standard = (Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib"))
    seen: set[str] = set()
    out: dict[str, list[Exchange]] = {}
    for root in (libraries, standard):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if {"tests", "test", "site-packages"} & {*parts} or parts[0] == "trl_bilevel":
                continue
            package = STANDARD if root == standard else parts[0]
            for name, text in _found(path, ".".join(parts).removesuffix(".__init__")):
                if 6 <= len(text.split()) <= 45 and text not in seen:
                    seen.add(text)
                    out.setdefault(package, []).append(Exchange(name, text))
    return out


def large_task(name: str, rows: int, seed: int) -> Task:
    """A task of so many rows, a quarter of them good, the others damaged in three ways.

    Args:
        name: "mixed": trusted and test rows are drawn as the training rows are. "shifted": they are from one large
            package, the training rows from all others. "natural": nothing is damaged; trusted and test rows are from
            the standard library, the training rows are what all other packages hold, as it is found.
    """
    rng, found = random.Random(f"{name}-{rows}-{seed}"), docstrings()
    everything = [exchange for package in found.values() for exchange in package]
    if name == "mixed":
        rng.shuffle(everything)
        clean, pool = everything[: TRUSTED + TEST], everything[TRUSTED + TEST :]
    else:
        large = sorted(package for package, own in found.items() if len(own) >= LARGE and package != STANDARD)
        source = STANDARD if name == "natural" else rng.choice(large)
        clean = rng.sample(found[source], TRUSTED + TEST)
        pool = [exchange for package, own in found.items() if package != source for exchange in own]
        rng.shuffle(pool)
    if len(pool) < rows:
        raise ValueError(f"The installed packages have {len(pool)} docstrings for training rows, {rows} are wanted.")
    good = rows if name == "natural" else round(GOOD_SHARE * rows)
    train = [_row(exchange) | {"kind": "good"} for exchange in pool[:good]]
    for place, exchange in enumerate(pool[good:rows]):
        damage = DAMAGES[place % len(DAMAGES)]
        answer = damage(exchange, rng, pool)
        train.append(_row(Exchange(exchange.question, answer)) | {"kind": damage.__name__})
    rng.shuffle(train)
    held_out = [_row(exchange) for exchange in clean]
    return Task(name, *map(Dataset.from_list, (train, held_out[:TRUSTED], held_out[TRUSTED:])))


def _row(exchange: Exchange) -> dict[str, str]:
    return {"prompt": PROMPT.format(name=exchange.question), "completion": exchange.answer + END}
