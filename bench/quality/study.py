#!/usr/bin/env python3
"""Runs the learning study: which optimizer learns a LoRA adapter best, at its own best rate?

    study.py --results FOLDER --build FOLDER            everything that is missing
    study.py --results FOLDER --build FOLDER --quick    the small grid of GRIDS["quick"]

For every cell (task, rank, start) and contender: a search on validation data over a logarithmic grid of rates, which grows
while its best rate lies at an edge and is then refined around it; then the best rate with fresh seeds on test data that
the search has not seen. FOLDER/runs.jsonl keeps one line a run and is all the state there is: what it holds is not run
again, so the study can be stopped at any time. `report.py` makes tables and pictures of it.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/finetune"
LOPSIDED = 10.0  # A × 10; B = 0 at the start, so that B × 0.1 changes nothing


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt. A regression's data come from its seed; a text task has files of its own."""

    title: str
    model: str  # regression, or a model of .deps that finetune trains
    steps: int
    arguments: tuple[str, ...] = ()
    lower: int = 0  # by how many half decades searches begin lower than a contender's `first`
    source: str = ""  # MiniLM: of prepare_reviews.py
    test_size: int = 0
    validation_size: int = 0
    search_seeds: tuple[int, ...] = (0,)
    test_seeds: tuple[int, ...] = (101, 102, 103, 104, 105)

    @property
    def is_text(self) -> bool:
        return self.model != "regression"


def regression(title: str, **settings: float) -> Task:
    arguments = [word for key, value in settings.items() for word in (f"--{key}", f"{value:g}")]
    return Task(title, "regression", 600, tuple(arguments), search_seeds=(0, 1, 2))


def language(title: str) -> Task:
    return Task(title, "smollm2", 120, ("--batch", "8", "--warmup", "10"), lower=1, test_size=500, validation_size=300,
                test_seeds=(101, 102, 103))


TASKS = {
    "isotropic": regression("regression, isotropic inputs", correlation=0, noise=0.05),
    "correlated": regression("regression, correlated inputs", correlation=1, noise=0.05),
    "noisy": regression("regression, correlated inputs, noisy labels", correlation=1, noise=1),
    "narrow": regression("regression, 64 wide, isotropic inputs", correlation=0, noise=0.05, **{"in": 64, "out": 64}),
    "wide": regression("regression, 1024 wide, isotropic inputs", correlation=0, noise=0.05, **{"in": 1024, "out": 1024}),
    "movies": Task("MiniLM, movie reviews", "minilm", 150, source="movies", test_size=1500, validation_size=1000),
    "amazon": Task("MiniLM, amazon reviews", "minilm", 150, source="amazon", test_size=800, validation_size=500),
    "tweets": Task("MiniLM, tweets", "minilm", 150, source="tweets", test_size=800, validation_size=500),
    "kinds": language("SmolLM2-135M, what kind of thing is this word"),
    "instructions": language("SmolLM2-135M, four instructions about words"),
}
TEXTS = ("movies", "amazon", "tweets")
REGRESSIONS = ("isotropic", "correlated", "noisy")


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer with its options, and where its search begins: rates are 10^(k/2), k from `first` on."""

    optimizer: str
    first: tuple[int, int]  # regression, text
    arguments: tuple[str, ...] = ()


CONTENDERS = {
    "rite": Contender("rite", (-6, -8)),
    "rite, bounded": Contender("rite", (-6, -8), ("--max-relative-change", "0.3")),
    "adam": Contender("adam", (-6, -7)),
    "adamw": Contender("adamw", (-6, -7)),
    "lora+": Contender("lora+", (-7, -9)),
    "scaled-adam": Contender("scaled-adam", (-6, -7)),
    "shampoo": Contender("shampoo", (-5, -6)),
    "lamb": Contender("lamb", (-4, -5)),
    "adagrad": Contender("adagrad", (-4, -5)),
    "rmsprop": Contender("rmsprop", (-6, -8)),
    "muon": Contender("muon", (-5, -6)),
    "soap": Contender("soap", (-6, -7)),
    # what LoRA-RITE's options do
    "rite, bounded by 1": Contender("rite", (-6, -8), ("--max-relative-change", "1")),
    "rite, rows": Contender("rite", (-6, -8), ("--row-equilibration", "true")),
    "rite, rows, bounded": Contender("rite", (-6, -8), ("--row-equilibration", "true", "--max-relative-change", "0.3")),
    "rite, bounded, no escape": Contender("rite", (-6, -8), ("--max-relative-change", "0.3", "--escape", "false")),
    "rite, no escape": Contender("rite", (-6, -8), ("--escape", "false")),
    "rite, no clip": Contender("rite", (-6, -8), ("--clip", "0")),
    "rite, beta2 0.99": Contender("rite", (-6, -8), ("--beta2", "0.99")),
    "rite, B 4 times faster": Contender("rite", (-7, -9), ("--lr-ratio-b", "4")),
}
USUAL = ("rite, bounded", "adam", "rite", "lora+", "adamw")
OTHERS = ("scaled-adam", "shampoo", "lamb", "adagrad", "rmsprop", "muon", "soap")
OPTIONS = tuple(name for name in CONTENDERS if name.startswith("rite, ") and name not in USUAL)
RATES_AT_FIRST = 5


@dataclasses.dataclass(frozen=True)
class Cell:
    task: str
    rank: int = 16
    start: str = "usual"  # or lopsided


# Groups of (cells, contenders), in the order in which they are run.
GRIDS = {
    "quick": [([Cell("correlated"), Cell("correlated", start="lopsided")], USUAL)],
    "full": [
        ([Cell(task, 16, start) for task in REGRESSIONS for start in ("usual", "lopsided")], USUAL + OTHERS),
        ([Cell(task) for task in REGRESSIONS], OPTIONS),
        ([Cell(task) for task in TEXTS], USUAL),
        ([Cell(task, rank) for rank in (4, 64) for task in REGRESSIONS], USUAL + OTHERS),
        ([Cell("narrow"), Cell("wide")], ("rite", "adam", "lora+")),  # does a rate carry over?
        ([Cell(task, start="lopsided") for task in TEXTS], ("rite", "adam")),
        ([Cell("movies")], OTHERS),
        ([Cell(task, rank) for rank in (4, 64) for task in TEXTS], ("rite", "adam")),
        ([Cell("movies")], OPTIONS),
        ([Cell(task) for task in ("amazon", "tweets")], OTHERS),
        ([Cell("movies", start="lopsided")], ("rite, bounded", "lora+", "adamw")),
        ([Cell(task) for task in ("kinds", "instructions")], ("rite", "adam", "rite, bounded", "lora+")),
    ],
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a program. Regressions are short, so one call makes the runs of all its seeds."""

    cell: Cell
    contender: str
    lr: float
    seeds: tuple[int, ...]
    split: str  # validation or test

    def keys(self) -> list[tuple]:
        return [(self.cell.task, self.cell.rank, self.cell.start, self.contender, self.lr, seed, self.split)
                for seed in self.seeds]


def key_of(run: dict) -> tuple:
    return tuple(run[name] for name in ("task", "rank", "start", "contender", "lr", "seed", "split"))


def rate(quarter: int) -> float:
    """10^(quarter/4), with two digits, so that it reads well and compares equal."""
    return float(f"{10 ** (quarter / 4):.1e}")


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.mean(math.log(max(value, 1e-30)) for value in values))


class Study:
    def __init__(self, runs: list[dict], grid: str):
        self.runs = {key_of(run): run for run in runs}
        self.grid = [(cell, contender) for cells, names in GRIDS[grid] for cell in cells for contender in names]

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
        return [], min([best, *fine], key=lambda quarter: self.loss(cell, contender, quarter))

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
            count += len(missing) + 2 + test if missing else len(self.missing(self.jobs(cell, contender, [best], "test")))
        return count


class Programs:
    """Calls the two programs. Every worker has a folder of its own, in which the tokens stay from run to run."""

    def __init__(self, build: pathlib.Path, results: pathlib.Path, deps: pathlib.Path):
        self.build, self.results, self.deps = build, results, deps
        self.children: set[subprocess.Popen] = set()
        self.prepare, self.starting = threading.Lock(), threading.Lock()
        self.stopped = False

    def run(self, job: Job) -> list[dict]:
        task, contender = TASKS[job.cell.task], CONTENDERS[job.contender]
        common = ["--optimizer", contender.optimizer, "--rank", str(job.cell.rank), "--steps", str(task.steps),
                  "--init-scale", f"{LOPSIDED if job.cell.start == 'lopsided' else 1:g}", "--lr", repr(job.lr),
                  *contender.arguments, *task.arguments]
        runs = self.finetune(job, task, common) if task.is_text else self.regression(job, task, common)
        place = {"task": job.cell.task, "rank": job.cell.rank, "start": job.cell.start, "contender": job.contender,
                 "lr": job.lr, "split": job.split}
        return [{**place, **run} for run in runs]

    def regression(self, job: Job, task: Task, common: list[str]) -> list[dict]:
        output = self.call([str(self.build / "bench/regression"), *common, "--seed", *map(str, job.seeds)])
        runs = [{key: value for key, value in json.loads(line).items() if key != "lr"} for line in output.splitlines()]
        for run in runs:
            run["curve"] = [None if value is None else float(f"{value:.3g}") for value in run["curve"]]
            run["ms_per_step"] = round(run["ms_per_step"], 3)
        return runs

    def finetune(self, job: Job, task: Task, common: list[str]) -> list[dict]:
        out = self.results / "work" / f"{threading.get_ident()}-{job.cell.task}-{job.split}"
        files = self.sentences(job, task) if task.model == "minilm" else self.language(job, task)
        self.call([str(self.build / "examples/finetune/finetune"), "train", *common, *files,
                   "--model", str(self.deps / task.model), "--out", str(out), "--overwrite",
                   "--threads", "1", "--checkpoint-every", "0", "--seed", str(job.seeds[0])])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps, final = lines[:-1], lines[-1]
        losses = [math.nan if line["loss"] is None else line["loss"] for line in steps]
        part = max(1, len(losses) // 15)
        curve = [statistics.mean(losses[begin:begin + part]) for begin in range(0, len(losses), part)]
        return [{"seed": job.seeds[0], **(self.sentence_scores if task.model == "minilm" else self.text_scores)(lines),
                 "curve": [None if math.isnan(value) else round(value, 5) for value in curve],
                 "ms_per_step": round(final["ms_per_step"], 2), "optimizer_share": round(final["optimizer_share"], 5)}]

    def sentences(self, job: Job, task: Task) -> list[str]:
        """Reviews and tweets, measured in the middle and at the end where that is wanted."""
        data = self.results / "data" / job.cell.task
        with self.prepare:
            if not (data / "train.tsv").exists():
                self.python("prepare_reviews.py", self.deps / "movie-reviews/vaderSentiment-3.3.2.tar.gz", data, "--source",
                            task.source, "--test-size", task.test_size, "--validation-size", task.validation_size)
        return ["--train", str(data / "train.tsv"), "--test", str(data / f"{job.split}.tsv"),
                *(["--evaluate-every", str(task.steps // 2)] if job.split == "test" else [])]

    @staticmethod
    def sentence_scores(lines: list[dict]) -> dict:
        accuracies = [line["test_accuracy"] for line in lines if "test_accuracy" in line]
        return {"test_loss": lines[-1]["test_loss"], "test_accuracy": accuracies[-1], "best_accuracy": max(accuracies)}

    def language(self, job: Job, task: Task) -> list[str]:
        """The two tasks of WordNet. All are judged by the loss of the right continuation, which is the "validation" of
        these runs; the questions of `kinds` have choices too, which are ranked on test data."""
        words, data = self.results / "data/words", self.results / "data" / job.cell.task
        has_choices = job.cell.task == "kinds"
        with self.prepare:
            if not words.exists():
                self.python("prepare_words.py", "/usr/share/wordnet", words.with_suffix(".part"))
                words.with_suffix(".part").rename(words)
            data.mkdir(parents=True, exist_ok=True)
            for split, size in (("train", 0), ("validation", task.validation_size), ("test", task.test_size)):
                inputs = sorted((words / f"{job.cell.task}.{split}").glob("*.json")) or [
                    words / f"{job.cell.task}.{split}.jsonl"]
                for purpose in ("train", "evaluate") if has_choices and split == "test" else ("train",):
                    path = data / f"{split}.{purpose}.jsonl"
                    if not path.exists():
                        self.python("prepare_tasks.py", "arc" if has_choices else "super_ni", *inputs, "--model",
                                    self.deps / task.model, "--out", path.with_suffix(".all"), "--for", purpose)
                        sample_records(path.with_suffix(".all"), path, size)
        choices = data / "test.evaluate.jsonl"
        return ["--train", str(data / "train.train.jsonl"), "--validation", str(data / f"{job.split}.train.jsonl"),
                *(["--test", str(choices)] if job.split == "test" and choices.exists() else [])]

    @staticmethod
    def text_scores(lines: list[dict]) -> dict:
        loss = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
        return {"test_loss": loss, **({"test_accuracy": lines[-1]["test_acc"]} if "test_acc" in lines[-1] else {})}

    def python(self, script: str, *arguments: object) -> None:
        self.call([sys.executable, str(EXAMPLE / script), *map(str, arguments)])

    def call(self, command: list[str]) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FINETUNE_PYTHON": sys.executable}
        with self.starting:
            if self.stopped:
                return ""
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                     env=environment, start_new_session=True)  # Ctrl-C is for us: we end the children
            self.children.add(child)
        output, errors = child.communicate()
        self.children.discard(child)
        if child.returncode != 0 and not self.stopped:
            raise RuntimeError(f"{' '.join(command)} ended with code {child.returncode}: {errors.strip()[-2000:]}")
        return output

    def stop(self) -> None:
        with self.starting:
            self.stopped = True
        for child in list(self.children):
            child.kill()


def sample_records(source: pathlib.Path, target: pathlib.Path, size: int) -> None:
    """The head of a file of prepare_tasks.py and `size` of its records drawn at random, the same ones at any time; 0: all."""
    head, *records = source.read_text(encoding="utf-8").splitlines(keepends=True)
    if 0 < size < len(records):
        records = random.Random(0).sample(records, size)
    part = target.with_suffix(".part")
    part.write_text(head + "".join(records), encoding="utf-8")
    part.rename(target)


def read_runs(path: pathlib.Path) -> list[dict]:
    """The runs so far; a line that a crash has cut short is dropped."""
    runs = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                runs.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{path}: a line that is not JSON is left out", file=sys.stderr)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, required=True, help="folder of runs.jsonl")
    parser.add_argument("--build", type=pathlib.Path, required=True, help="build folder with regression and finetune")
    parser.add_argument("--quick", action="store_true", help="the small grid")
    parser.add_argument("--only", default="", help="contenders to run, separated by semicolons (default: all)")
    parser.add_argument("--tasks", default="", help="tasks to run, separated by commas (default: all)")
    parser.add_argument("--ranks", default="", help="ranks to run, separated by commas (default: all)")
    parser.add_argument("--starts", default="", help="starts to run, separated by commas (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default %(default)s)")
    options = parser.parse_args()

    from tqdm import tqdm

    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "runs.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with open(path, "a", encoding="utf-8") as log:
            log.write("\n")  # behind a line that a crash cut short
    study = Study(read_runs(path), "quick" if options.quick else "full")
    if options.only:
        study.grid = [(cell, name) for cell, name in study.grid if name in options.only.split(";")]
    if options.tasks:
        study.grid = [(cell, name) for cell, name in study.grid if cell.task in options.tasks.split(",")]
    if options.ranks:
        study.grid = [(cell, name) for cell, name in study.grid if str(cell.rank) in options.ranks.split(",")]
    if options.starts:
        study.grid = [(cell, name) for cell, name in study.grid if cell.start in options.starts.split(",")]
    programs = Programs(options.build, options.results, ROOT / ".deps")
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
