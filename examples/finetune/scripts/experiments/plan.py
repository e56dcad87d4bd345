"""An experiment's files and runs: every optimizer at every rate, the best rate with more seeds, what comes out."""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys

import prepare_tasks
from spread import spread

from experiments.answers import is_right
from experiments.commands import Commands, read_json, read_lines, say, write
from experiments.rates import at_end, best, search
from experiments.recipes import EXPERIMENTS, INSTANCES, MODELS, WARMUP, Contender, Task
from experiments.report import table

SCRIPTS = pathlib.Path(__file__).resolve().parents[1]


class Plan:
    """`model` is one of MODELS; `options` are reproduce.py's, with the contenders in place of their names."""

    def __init__(self, options: argparse.Namespace, model: str, tasks: dict[str, Task]):
        self.options = options
        self.experiment = EXPERIMENTS[options.experiment]
        self.commands = Commands(options.dry_run)
        self.model = model
        self.tasks = tasks

    def data(self, name: str) -> pathlib.Path:
        """The folder of what is made of a task's data: no other task writes there."""
        return self.options.out / "data" / name

    def tokens(self, name: str, part: str) -> pathlib.Path:
        """The file of `train`, `validation`, or of a test with the way it is measured: `boolq.choices`."""
        return self.data(name) / f"{part}.jsonl"

    def run_folder(self, name: str, contender: str, rate: str, seed: int) -> pathlib.Path:
        return self.options.out / "runs" / name / contender / rate / f"seed-{seed}"

    # -- What may not change while results are added to a folder

    def settings(self, name: str) -> dict:
        task, options = self.tasks[name], self.options
        own = ["rank", "batch", "micro_batch", "epochs", "steps", "max_length", "loss", "records", "held_out"]
        own += ["evaluate_every", "test_records", "generate", "dtype", "target_modules"]
        return {
            "model": str(options.model.resolve()),
            "train": list(task.train),
            "tests": list(task.tests),
            **{option: getattr(options, option) for option in own},
            "more": options.more,
        }

    def keep_settings(self, name: str) -> None:
        """Refuses to mix runs with others: files that are there already are not made again."""
        if self.commands.dry:
            return
        path, now = self.data(name) / "settings.json", self.settings(name)
        if not path.is_file():
            write(path, json.dumps(now, indent=2) + "\n")
            return
        before = read_json(path)
        other = [
            f"{key} was {before.get(key)!r}, is {value!r}" for key, value in now.items() if before.get(key) != value
        ]
        if other:
            sys.exit(
                f"reproduce: {self.options.out}: holds results of {name} with other settings: {'; '.join(other)}; "
                "give those again, or another folder with --out"
            )

    # -- Data

    def inputs(self, name: str, part: str, files: list[str]) -> list[pathlib.Path]:
        task = self.tasks[name]
        paths = [self.options.data / task.source / file for file in files]
        if task.form != "super_ni":
            return paths
        # The split lists tasks by name; of each the first instances are taken.
        made = []
        for each in (word for path in paths for word in path.read_text(encoding="utf-8").split()):
            out = self.data(name) / part / f"{each}.json"
            made.append(out)
            if not out.is_file() and not self.commands.dry:
                content = read_json(self.options.data / task.source / "tasks" / f"{each}.json")
                content["Instances"] = content["Instances"][:INSTANCES]
                write(out, json.dumps(content))
        return made

    def prepare(self, name: str) -> None:
        task, options = self.tasks[name], self.options
        learned = ("--loss", options.loss)
        self.prepare_file(name, "train", list(task.train), options.records, "train", *learned)
        if task.validation:
            self.prepare_file(name, "validation", [task.validation], options.held_out, "train", *learned)
        for test, file in task.tests.items():
            for measure in task.measures:
                purpose = "evaluate" if measure == "choices" else "train"
                self.prepare_file(name, f"{test}.{measure}", [file], options.test_records, purpose)

    def prepare_file(self, name: str, part: str, files: list[str], at_most: int, purpose: str, *more: str) -> None:
        out = self.tokens(name, part)
        if out.is_file():
            return
        if not self.commands.dry:
            out.parent.mkdir(parents=True, exist_ok=True)
        held_out = part == "train" and self.tasks[name].validation is None
        whole = self.tokens(name, "all") if held_out else out
        words = ["--model", self.options.model, "--out", whole, "--for", purpose]
        words += ["--max-length", self.options.max_length, "--malformed", "skip", *more]
        words += ["--at-most", at_most] if at_most else []
        inputs = self.inputs(name, part, files)
        self.commands.run(self.options.python, SCRIPTS / "prepare_tasks.py", self.tasks[name].form, *inputs, *words)
        if held_out and not self.commands.dry:
            self.hold_out(whole, name)

    def hold_out(self, whole: pathlib.Path, name: str) -> None:
        header, *records = read_lines(whole)
        count = len(records)
        usual = min(self.experiment.held_out, math.ceil(count / 20)) if count >= 20 else count // 2
        chosen = set(spread(self.options.held_out or usual, count))
        held_out = [record for at, record in enumerate(records) if at in chosen]
        train = [record for at, record in enumerate(records) if at not in chosen]
        if not held_out or not train:
            sys.exit(
                f"reproduce: {whole}: has {count} records, too few to hold {self.options.held_out or 'some'} out for "
                "validation"
            )
        write(self.tokens(name, "validation"), "\n".join([header, *held_out]) + "\n")
        write(self.tokens(name, "train"), "\n".join([header, *train]) + "\n")  # the last: its presence says all is done
        whole.unlink()

    def count(self, name: str, part: str) -> int:
        return len(read_lines(self.tokens(name, part))) - 1

    def steps(self, name: str) -> int:
        if self.options.steps:
            return self.options.steps
        if self.commands.dry and not self.tokens(name, "train").is_file():
            return 0  # nobody knows yet
        return max(1, math.ceil(self.options.epochs * self.count(name, "train") / self.options.batch))

    def extent(self, name: str) -> dict:
        """How much of the data is taken, and how long."""
        task, options = self.tasks[name], self.options

        def there(part: str, files: list[str]) -> int:
            return len(prepare_tasks.read(task.form, [str(path) for path in self.inputs(name, part, files)]))

        train, held_out = self.count(name, "train"), self.count(name, "validation")
        return {
            "train": {"taken": train, "of": there("train", list(task.train)) - (0 if task.validation else held_out)},
            "files": list(task.train),
            "held_out": held_out,
            "steps": self.steps(name),
            "batch": options.batch,
            "epochs": self.steps(name) * options.batch / train,
            "max_length": options.max_length,
            "loss": options.loss,
            "tests": {
                test: {
                    "taken": self.count(name, f"{test}.{task.measures[0]}"),
                    "of": there(f"{test}.{task.measures[0]}", [file]),
                }
                for test, file in task.tests.items()
            },
        }

    # -- Runs

    def train_options(self, name: str, contender: str, rate: str, seed: int) -> list:
        options = self.options
        steps = self.steps(name)
        every = max(1, min(self.experiment.evaluate_every or steps, steps // 10))
        words = ["--model", options.model]
        words += ["--train", self.tokens(name, "train"), "--validation", self.tokens(name, "validation")]
        words += ["--out", self.run_folder(name, contender, rate, seed)]
        words += [*options.contenders[contender].words(), "--lr", rate, "--seed", seed]
        words += ["--rank", options.rank, "--alpha", options.rank, "--dropout", "0.05"]
        words += ["--target-modules", options.target_modules or MODELS[self.model].targets]
        words += ["--batch", options.batch, "--micro-batch", options.micro_batch]
        words += ["--steps", steps or "STEPS", "--warmup", min(WARMUP, steps // 7) if steps else "WARMUP"]
        words += ["--schedule", "linear"]
        words += ["--evaluate-every", options.evaluate_every or (every if steps else "STEPS/10")]
        words += ["--dtype", options.dtype, "--device", options.device, "--python", options.python]
        return words + (["--threads", options.threads] if options.threads else []) + options.more

    def final_line(self, folder: pathlib.Path) -> dict | None:
        metrics = folder / "metrics.jsonl"
        if not metrics.is_file():
            return None
        lines = metrics.read_text(encoding="utf-8").splitlines()
        try:
            last = json.loads(lines[-1])
        except (IndexError, ValueError):
            return None
        return last if last.get("final") else None

    def train(self, name: str, contender: str, rate: str, seed: int) -> float:
        """The least loss on the validation data; infinity if there was none."""
        folder = self.run_folder(name, contender, rate, seed)
        if self.final_line(folder) is None:
            if (folder / "run.json").is_file() and (folder / "checkpoint.pt").is_file():
                self.commands.run(self.options.finetune, "train", "--resume", "--out", folder)
            else:
                words = self.train_options(name, contender, rate, seed)
                self.commands.run(self.options.finetune, "train", *words, "--overwrite")
        loss = (self.final_line(folder) or {}).get("best_validation_loss")
        return loss if isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf

    def search(self, name: str, contender: str, rates: list[str]) -> dict[str, float]:
        """The validation loss at each rate."""
        options = self.options
        most_added = 0 if self.commands.dry else options.widen
        losses = search(rates, most_added, lambda rate: self.train(name, contender, rate, 0))
        if len(losses) > 2 and at_end(losses) and not self.commands.dry:
            say(
                f"{name}, {contender}: the best rate {best(losses)} is an end of its grid; go on with a greater --widen"
            )
        return losses

    def evaluate(self, name: str, contender: str, rate: str, seed: int) -> dict[str, dict]:
        """The scores on each test."""
        task, options = self.tasks[name], self.options
        folder = self.run_folder(name, contender, rate, seed)
        scores: dict[str, dict] = {test: {} for test in task.tests}
        for measure in task.measures:
            out, texts = folder / f"{measure}.json", folder / "texts.jsonl"
            if not out.is_file() or (measure == "texts" and not texts.is_file()):
                words = ["--model", options.model, "--adapter", folder / "best"]
                words += ["--data", *(self.tokens(name, f"{test}.{measure}") for test in task.tests)]
                words += ["--batch", options.micro_batch or options.batch, "--dtype", options.dtype]
                words += ["--device", options.device, "--out", out, "--python", options.python]
                if measure == "texts":
                    words += ["--generate", options.generate or task.generate, "--texts", texts]
                words += ["--threads", options.threads] if options.threads else []
                self.commands.run(options.finetune, "eval", *words)
            if self.commands.dry:
                continue
            for test, result in zip(task.tests, read_json(out)["results"], strict=True):
                scores[test].update(result)
        if "first_answer" in task.scores and not self.commands.dry:
            for test, value in self.first_answers(name, folder / "texts.jsonl").items():
                scores[test]["first_answer"] = value
        return scores

    def first_answers(self, name: str, texts: pathlib.Path) -> dict[str, float]:
        """Of each test the share of texts whose first answer is the right one."""
        written = [json.loads(line) for line in read_lines(texts)]
        shares = {}
        for test in self.tasks[name].tests:
            data = self.tokens(name, f"{test}.texts")
            references = [json.loads(record)["references"][0] for record in read_lines(data)[1:]]
            own = [line["text"] for line in written if line["data"] == str(data)]
            right = [is_right(text, reference) for text, reference in zip(own, references, strict=True)]
            shares[test] = sum(right) / len(right)
        return shares

    def ask_program(self, name: str) -> None:
        """Whether it takes every contender's options, rather now than after hours, and how much memory the first needs:
        it reckons before it loads anything, and refuses what is over the limit with the sum."""
        if self.commands.dry:
            return
        needs = [self.ask_memory(name, contender) for contender in self.options.contenders]
        say(f"{name}: a run takes about {needs[0]}")

    def ask_memory(self, name: str, contender: str) -> str:
        words = [str(word) for word in self.train_options(name, contender, "1e-4", 0)]
        words[words.index("--out") + 1] = str(self.options.out / "memory")
        if "--memory-limit" in words:
            at = words.index("--memory-limit")
            words[at : at + 2] = []
        words = [word for word in words if not word.startswith("--memory-limit=")]
        asked = subprocess.run(
            [str(self.options.finetune), "train", *words, "--overwrite", "--memory-limit", "1e-9"],
            capture_output=True,
            text=True,
        )
        sum_of = re.search("the run needs about (.*?), but may take .*?: (.*?);", asked.stderr)
        if sum_of is None:
            sys.exit(f"reproduce: {asked.stderr.strip()}")
        return f"{sum_of[1]} of memory: {sum_of[2]}"

    # -- All of it

    def carry_out(self) -> None:
        title = MODELS[self.model].title
        report: dict = {
            "experiment": self.options.experiment,
            "model": "" if self.options.any_model else self.model,
            "title": f"{self.options.model}, with the settings of {title}" if self.options.any_model else title,
            "extent": {},
            "results": [],
        }
        for name in self.tasks:
            self.keep_settings(name)
        for name in self.tasks:
            self.prepare(name)
            self.ask_program(name)
            if not self.commands.dry:
                report["extent"][name] = self.extent(name)
            for contender in self.options.contenders:
                result = self.compare(name, contender)
                if self.commands.dry:
                    continue
                report["results"].append(result)
                write(self.options.out / "results.json", json.dumps(report, indent=2) + "\n")
                write(self.options.out / "table.md", table(report, self.tasks))
        if not self.commands.dry:
            print((self.options.out / "table.md").read_text(encoding="utf-8"), end="")
            say(f"the table: {self.options.out / 'table.md'}; all numbers: {self.options.out / 'results.json'}")

    def compare(self, name: str, contender: str) -> dict:
        """The search for a rate, and the tests at the best one."""
        chosen: Contender = self.options.contenders[contender]
        losses = self.search(name, contender, chosen.rates.split(","))
        rate = "BEST" if self.commands.dry else best(losses)
        tests = []
        for seed in range(self.options.seeds):
            if seed > 0:
                self.train(name, contender, rate, seed)
            tests.append(self.evaluate(name, contender, rate, seed))
        return {
            "task": name,
            "optimizer": contender,
            "options": chosen.words(),
            "rate": rate,
            "rates": {each: loss if math.isfinite(loss) else None for each, loss in losses.items()},
            "tests": tests,
        }
