"""Calls of the study's two programs: bench/regression, and finetune with the files that its tasks need."""

import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import threading

from grid import CONTENDERS, TASKS, Job, Task

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "examples/finetune/scripts"
LOPSIDED = 10.0  # A × 10; B = 0 at the start, so that B × 0.1 changes nothing


class Programs:
    """Calls the two programs. Every worker has a folder of its own, in which the tokens stay from run to run."""

    def __init__(self, build: pathlib.Path, results: pathlib.Path, deps: pathlib.Path, device: str):
        self.build, self.results, self.deps, self.device = build, results, deps, device
        self.children: set[subprocess.Popen] = set()
        self.prepare, self.starting = threading.Lock(), threading.Lock()
        self.stopped = False

    def run(self, job: Job) -> list[dict]:
        task, contender = TASKS[job.cell.task], CONTENDERS[job.contender]
        common = [
            "--optimizer",
            contender.optimizer,
            "--rank",
            str(job.cell.rank),
            "--steps",
            str(task.steps),
            "--init-scale",
            f"{LOPSIDED if job.cell.start == 'lopsided' else 1:g}",
            "--lr",
            repr(job.lr),
            *contender.arguments,
            *task.arguments,
        ]
        runs = self.finetune(job, task, common) if task.is_text else self.regression(job, task, common)
        place = {
            "task": job.cell.task,
            "rank": job.cell.rank,
            "start": job.cell.start,
            "contender": job.contender,
            "lr": job.lr,
            "split": job.split,
        }
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
        if "rite" in common and "--max-relative-change" not in common:
            common = [*common, "--max-relative-change", "0"]  # the paper's rule, which finetune bounds by default
        self.call(
            [
                str(self.build / "examples/finetune/finetune"),
                "train",
                *common,
                *files,
                "--model",
                str(self.deps / task.model),
                "--out",
                str(out),
                "--overwrite",
                "--threads",
                "1",
                "--device",
                self.device,
                "--checkpoint-every",
                "0",
                "--seed",
                str(job.seeds[0]),
            ]
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps, final = lines[:-1], lines[-1]
        losses = [math.nan if line["loss"] is None else line["loss"] for line in steps]
        part = max(1, len(losses) // 15)
        curve = [statistics.mean(losses[begin : begin + part]) for begin in range(0, len(losses), part)]
        return [
            {
                "seed": job.seeds[0],
                **(self.sentence_scores if task.model == "minilm" else self.text_scores)(lines),
                "curve": [None if math.isnan(value) else round(value, 5) for value in curve],
                "ms_per_step": round(final["ms_per_step"], 2),
                "optimizer_share": round(final["optimizer_share"], 5),
                **({} if self.device == "cpu" else {"device": self.device}),
            }
        ]

    def sentences(self, job: Job, task: Task) -> list[str]:
        """Reviews and tweets, measured in the middle and at the end where that is wanted."""
        data = self.results / "data" / job.cell.task
        with self.prepare:
            if not (data / "train.tsv").exists():
                self.python(
                    "prepare_reviews.py",
                    self.deps / "movie-reviews/vaderSentiment-3.3.2.tar.gz",
                    data,
                    "--source",
                    task.source,
                    "--test-size",
                    task.test_size,
                    "--validation-size",
                    task.validation_size,
                )
        return [
            "--train",
            str(data / "train.tsv"),
            "--test",
            str(data / f"{job.split}.tsv"),
            *(["--evaluate-every", str(task.steps // 2)] if job.split == "test" else []),
        ]

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
                    words / f"{job.cell.task}.{split}.jsonl"
                ]
                for purpose in ("train", "evaluate") if has_choices and split == "test" else ("train",):
                    path = data / f"{split}.{purpose}.jsonl"
                    if not path.exists():
                        self.python(
                            "prepare_tasks.py",
                            "arc" if has_choices else "super_ni",
                            *inputs,
                            "--model",
                            self.deps / task.model,
                            "--out",
                            path.with_suffix(".all"),
                            "--for",
                            purpose,
                        )
                        sample_records(path.with_suffix(".all"), path, size)
        return [
            "--train",
            str(data / "train.train.jsonl"),
            "--validation",
            str(data / f"{job.split}.train.jsonl"),
            *(["--test", str(data / "test.evaluate.jsonl")] if job.split == "test" and has_choices else []),
        ]

    @staticmethod
    def text_scores(lines: list[dict]) -> dict:
        loss = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
        return {"test_loss": loss, **({"test_accuracy": lines[-1]["test_acc"]} if "test_acc" in lines[-1] else {})}

    def python(self, script: str, *arguments: object) -> None:
        self.call([sys.executable, str(SCRIPTS / script), *map(str, arguments)])

    def call(self, command: list[str]) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FINETUNE_PYTHON": sys.executable}
        with self.starting:
            if self.stopped:
                return ""
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )  # Ctrl-C is for us: we end the children
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
    """The head of a file of prepare_tasks.py and `size` of its records drawn at random, always the same; 0: all."""
    head, *records = source.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if 0 < size < len(records):
        records = random.Random(0).sample(records, size)
    part = target.with_suffix(".part")
    part.write_text("\n".join([head, *records]) + "\n", encoding="utf-8")
    part.rename(target)
