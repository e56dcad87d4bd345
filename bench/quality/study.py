#!/usr/bin/env python3
"""Runs the learning study: which optimizer learns a LoRA adapter best, at its own best rate?

    study.py --results FOLDER --build FOLDER                 everything that is missing
    study.py --results FOLDER --build FOLDER --grid quick    another grid of grid.py
    study.py --results FOLDER --pack                         moves what runs.jsonl has into runs.jsonl.xz

For every cell (task, rank, start) and contender: a search on validation data over a logarithmic grid of rates, which
grows while its best rate lies at an edge and is then refined around it; then the best rate with fresh seeds on test
data that the search has not seen. FOLDER/runs.jsonl and runs.jsonl.xz keep one line a run and are all the state there
is: what they hold is not run again, so the study can be stopped at any time. The packed file is the one that git has.
`report.py` makes tables and pictures of them.
"""

import argparse
import dataclasses
import json
import lzma
import math
import os
import pathlib
import statistics
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from grid import CONTENDERS, GRIDS, MIDDLE_RANK, RATES_AT_FIRST, TASKS, Cell, Job, key_of, rate
from programs import Programs

ROOT = pathlib.Path(__file__).resolve().parents[2]


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.mean(math.log(max(value, 1e-30)) for value in values))


class Study:
    def __init__(self, runs: list[dict], grid: str):
        self.runs = {key_of(run): run for run in runs}
        self.grid = [(cell, contender) for cells, names in GRIDS[grid] for cell in cells for contender in names]
        self.carries_rates = grid == "ranks"

    def jobs(self, cell: Cell, contender: str, quarters: list[int], split: str) -> list[Job]:
        task = TASKS[cell.task]
        seeds = task.search_seeds if split == "validation" else task.test_seeds
        parts = [(seed,) for seed in seeds] if task.is_text else [seeds]
        return [Job(cell, contender, rate(quarter), part, split) for part in parts for quarter in quarters]

    def missing(self, jobs: list[Job]) -> list[Job]:
        return [job for job in jobs if not all(key in self.runs for key in job.keys())]

    def loss(self, cell: Cell, contender: str, quarter: int) -> float:
        """Mean loss over the search's seeds: the geometric one for regressions, whose errors span decades."""
        keys = [key for job in self.jobs(cell, contender, [quarter], "validation") for key in job.keys()]
        losses = [self.runs[key]["test_loss"] for key in keys]
        if any(loss is None or not math.isfinite(loss) for loss in losses):
            return math.inf
        return statistics.mean(losses) if TASKS[cell.task].is_text else geometric_mean(losses)

    def search(self, cell: Cell, contender: str) -> tuple[list[Job], int]:
        """The jobs that the search still needs, and once there are none the best rate's quarter."""
        task = TASKS[cell.task]
        first = 2 * (CONTENDERS[contender].first[task.is_text] - task.lower)
        low, high = first, first + 2 * (RATES_AT_FIRST - 1)
        while True:
            coarse = list(range(low, high + 1, 2))
            missing = self.missing(self.jobs(cell, contender, coarse, "validation"))
            if missing:
                return missing, 0
            best = min(coarse, key=lambda quarter: self.loss(cell, contender, quarter))
            if best == low and low > first - 8:
                low -= 2
            elif best == high and high < first + 16:
                high += 2
            else:
                break
        fine = [best - 1, best + 1]
        missing = self.missing(self.jobs(cell, contender, fine, "validation"))
        if missing:
            return missing, 0
        best = min([best, *fine], key=lambda quarter: self.loss(cell, contender, quarter))
        return self.at_the_rate_of_the_middle_rank(cell, contender), best

    def at_the_rate_of_the_middle_rank(self, cell: Cell, contender: str) -> list[Job]:
        """Does one rate serve every rank? The jobs that say so, once the middle rank has its rate."""
        middle = dataclasses.replace(cell, rank=MIDDLE_RANK)
        if not self.carries_rates or cell == middle:
            return []
        missing, quarter = self.search(middle, contender)
        return missing or self.missing(self.jobs(cell, contender, [quarter], "validation"))

    def plan(self) -> list[Job]:
        """What can be run now, the most wanted first; more may follow from its results."""
        jobs = []
        for cell, contender in self.grid:
            missing, best = self.search(cell, contender)
            jobs += missing or self.missing(self.jobs(cell, contender, [best], "test"))
        return jobs

    def expected(self) -> int:
        """About how many jobs are left: a search that has hardly begun counts as one that meets no edge."""
        count = 0
        for cell, contender in self.grid:
            missing, best = self.search(cell, contender)
            test = len(self.jobs(cell, contender, [best], "test"))
            count += (
                len(missing) + 2 + test if missing else len(self.missing(self.jobs(cell, contender, [best], "test")))
            )
        return count


def read_runs(path: pathlib.Path) -> list[dict]:
    """The runs so far, packed ones first; a line that a crash has cut short is dropped."""
    runs = []
    for file in (packed(path), path):
        if not file.exists():
            continue
        data = file.read_bytes()
        for line in (data if file == path else lzma.decompress(data)).decode().splitlines():
            try:
                runs.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{file}: a line that is not JSON is left out", file=sys.stderr)
    return runs


def packed(path: pathlib.Path) -> pathlib.Path:
    """Where older runs are kept, a seventh as large."""
    return path.with_name(path.name + ".xz")


def pack(path: pathlib.Path) -> None:
    """Moves all runs into the packed file."""
    text = "".join(json.dumps(run) + "\n" for run in read_runs(path))
    new = path.with_name(path.name + ".part")
    new.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    new.replace(packed(path))
    path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, required=True, help="folder of runs.jsonl")
    parser.add_argument("--build", type=pathlib.Path, help="build folder with regression and finetune")
    parser.add_argument("--pack", action="store_true", help="pack the runs and do nothing else")
    parser.add_argument("--grid", choices=GRIDS, default="full", help="which runs (default %(default)s)")
    parser.add_argument("--only", default="", help="contenders to run, separated by semicolons (default: all)")
    parser.add_argument("--tasks", default="", help="tasks to run, separated by commas (default: all)")
    parser.add_argument("--ranks", default="", help="ranks to run, separated by commas (default: all)")
    parser.add_argument("--starts", default="", help="starts to run, separated by commas (default: all)")
    parser.add_argument("--device", default="cpu", help="where text tasks are run: cpu, cuda (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default %(default)s)")
    options = parser.parse_args()
    if options.pack:
        pack(options.results / "runs.jsonl")
        return
    if not options.build:
        parser.error("--build is missing")

    from tqdm import tqdm

    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "runs.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with open(path, "a", encoding="utf-8") as log:
            log.write("\n")  # behind a line that a crash cut short
    study = Study(read_runs(path), options.grid)
    if options.only:
        study.grid = [(cell, name) for cell, name in study.grid if name in options.only.split(";")]
    if options.tasks:
        study.grid = [(cell, name) for cell, name in study.grid if cell.task in options.tasks.split(",")]
    if options.ranks:
        study.grid = [(cell, name) for cell, name in study.grid if str(cell.rank) in options.ranks.split(",")]
    if options.starts:
        study.grid = [(cell, name) for cell, name in study.grid if cell.start in options.starts.split(",")]
    programs = Programs(options.build, options.results, ROOT / ".deps", options.device)
    running: dict = {}
    with ThreadPoolExecutor(options.workers) as pool, open(path, "a", encoding="utf-8") as log:
        progress = tqdm(total=study.expected(), unit="job", smoothing=0.05, dynamic_ncols=True)
        try:
            while True:
                under_way = set(running.values())
                for job in study.plan():
                    if len(running) >= options.workers:
                        break
                    if job not in under_way:
                        running[pool.submit(programs.run, job)] = job
                        under_way.add(job)
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    for run in future.result():
                        study.runs[key_of(run)] = run
                        log.write(json.dumps(run) + "\n")
                    log.flush()
                    progress.set_postfix_str(f"{job.cell.task} r={job.cell.rank} {job.cell.start}: {job.contender}")
                    progress.total = progress.n + 1 + study.expected()
                    progress.update()
        except KeyboardInterrupt:
            progress.close()
            sys.exit("\nstopped; what is done is kept, the same command goes on")
        finally:
            programs.stop()
        progress.close()


if __name__ == "__main__":
    main()
