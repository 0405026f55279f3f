"""Everything that docs/results.md shows of training: what has no result yet is run, then the report is written.

python -m benchmarks.evidence [--jobs 1] [--minutes 60] [--force]

What users ask about first comes first. Hours on 2 cores; on a GPU give `--jobs`, a little less than it has CPU cores.
Counted FLOPs, times and memory have commands of their own (docs/results.md names them).
"""

import argparse
from collections.abc import Iterator

from benchmarks import ablations, report, transfer
from benchmarks.jobs import Job, add_arguments, run_jobs
from benchmarks.run import experiments, jobs_of

FIRST = ("quality", "safety", "boilerplate", "truncated", "scrambled")
SECOND = ("quality_large", "truncated_large", "scrambled_large")
LAST = ("safety_scarce", "refine_levers")


def jobs() -> Iterator[Job]:
    for group in (FIRST, SECOND):
        yield from by_seed(group)
    yield from ablations.jobs(list(ablations.SETTINGS), (0, 1, 2))
    yield from by_seed(LAST)
    yield from transfer.jobs(transfer.TASKS, (0, 1, 2))


def by_seed(names: tuple[str, ...]) -> list[Job]:
    """The runs of several experiments; the first seed of all of them comes first."""
    found = [job for each in experiments(names) for job in jobs_of(each)]
    return sorted(found, key=lambda job: int(job.target.stem.rpartition("-seed")[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    try:
        run_jobs(jobs(), options)
    finally:
        report.main()


if __name__ == "__main__":
    main()
