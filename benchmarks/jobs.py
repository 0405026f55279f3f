"""Runs that share the work of one command: one after another, or several at a time in processes of their own."""

import argparse
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of the default weights, raised when they change. 2: smoothed by what rows alike say, full weight from the lower
# quartile of trusted scores on; before it, from their mean on. 3: from that of the lowest kind of trusted rows on.
# 4: the probe, which trains nothing.
METHOD = 4
# Arms whose weights are not the default's.
OWN_WEIGHTS = ("seal", "seal_two_stage", "pilot", "pilot_on_top", "lookahead", "loss", "alignment")
SHOWN = ("test_loss", "auc", "influence_auc", "good_share", "safety", "seconds")


@dataclass(frozen=True)
class Job:
    """One run, and the file of its result.

    Attributes:
        target: JSON file of the result; a job whose target is there is not run, unless the defaults have changed.
        make: function of a module, that returns the result; called with `arguments`.
        needs: result of another job that this one reads, if that job is among those to run.
    """

    target: Path
    make: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = ()
    needs: Path | None = None


def is_older(record: dict[str, Any]) -> bool:
    """Whether a result is of weights that today's defaults do not give any more."""
    learned = not {"good_share", "good_share_scored"}.isdisjoint(record) and record.get("arm") not in OWN_WEIGHTS
    return learned and record.get("method", 1) < METHOD


def is_done(target: Path) -> bool:
    return target.exists() and not is_older(json.loads(target.read_text()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs jobs."""
    parser.add_argument(
        "--force", action="store_true", help="run again what has a result, even one of today's defaults"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each in a process; a GPU has room for many"
    )
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")


def run_jobs(jobs: Iterable[Job], options: argparse.Namespace) -> None:
    """Run what has no result yet, in the order given as far as `needs` allows; an error in a run ends no other.

    Raises:
        SystemExit: at the end, if a run failed.
    """
    waiting = [job for job in jobs if options.force or not is_done(job.target)]
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    failed = 0
    if options.jobs == 1:
        while waiting and time.monotonic() < end:
            failed += not run_job(next_job(waiting, []))
    else:
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        context = multiprocessing.get_context("spawn")
        running: dict[Future[bool], Job] = {}
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            while running or (waiting and time.monotonic() < end):
                while waiting and len(running) < options.jobs and time.monotonic() < end:
                    job = next_job(waiting, running.values())
                    if job is None:
                        break
                    running[pool.submit(run_job, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    failed += not future.result()
    if waiting:
        print(f"{len(waiting)} runs were not begun in {options.minutes:g} minutes.", flush=True)
    if failed:
        raise SystemExit(f"{failed} runs failed: see above.")


def next_job(waiting: list[Job], running: Iterable[Job]) -> Job | None:
    """Takes the first job off the list whose need is not still to come; None if all wait for what runs now."""
    coming = {job.target for job in waiting} | {job.target for job in running}
    place = next((place for place, job in enumerate(waiting) if job.needs not in coming), None)
    return None if place is None else waiting.pop(place)


def run_job(job: Job) -> bool:
    """Run, write the result, say what came out; False if it failed."""
    name = f"{job.target.parent.name}/{job.target.stem}"
    try:
        record = job.make(*job.arguments)
    except Exception:
        print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        return False
    job.target.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.target.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, job.target)
    print(name, json.dumps({key: record[key] for key in SHOWN if record.get(key) is not None}), flush=True)
    return True
