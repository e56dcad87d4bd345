#!/usr/bin/env python3
"""The experiments of "LoRA Done RITE" (Yen et al., ICLR 2025), for those who have the weights and the data.

    scripts/reproduce gemma-2b --model ~/gemma-2b --data ~/data --out results
    scripts/reproduce gemma-2b --model ~/gemma-2b --data ~/data --out results --dry-run   prints the commands

For every task: the data become token ids; every optimizer is trained at every rate of its grid; the rate that does best
on held-out data is trained again with other seeds; what comes out is measured on the test data. Results are in
OUT/table.md and OUT/results.json. Stop it at any time: the same command goes on where it was, in the middle of a run.

DATA holds the data sets as published, in folders of these names:
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys

from whole_file import whole_file

HERE = pathlib.Path(__file__).resolve().parent

# --- Settings. Where each comes from is said in docs/reproducing.md.


@dataclasses.dataclass(frozen=True)
class Model:
    title: str
    fields: dict[str, object]  # of config.json
    targets: str


# Adapters on what the authors' recipe for Gemma names; mT5's are the like.
GEMMA_TARGETS = "q_proj,k_proj,v_proj,up_proj,down_proj"
MODELS = {
    "gemma-2b": Model("Gemma 2B", {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18}, GEMMA_TARGETS),
    "gemma-7b": Model("Gemma 7B", {"model_type": "gemma", "hidden_size": 3072, "num_hidden_layers": 28}, GEMMA_TARGETS),
    "mt5-xxl": Model("mT5-XXL", {"model_type": "mt5", "d_model": 4096, "num_layers": 24}, "q,k,v,wi_1,wo"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    form: str  # of prepare_tasks.py
    source: str  # what the data set is called, and the folder in DATA
    train: str
    test: str
    validation: str | None  # None: held out from the training data
    scores: tuple[str, ...]  # the first decides
    generate: int = 0  # tokens to write


TASKS = {
    "super_ni": Task(
        "super_ni",
        "natural-instructions",
        "splits/default/train_tasks.txt",
        "splits/default/test_tasks.txt",
        None,
        ("rouge_l", "exact_match"),
        generate=128,
    ),
    "hellaswag": Task(
        "hellaswag", "hellaswag", "hellaswag_train.jsonl", "hellaswag_val.jsonl", None, ("acc_norm", "acc")
    ),
    "arc_challenge": Task(
        "arc",
        "arc",
        "ARC-Challenge-Train.jsonl",
        "ARC-Challenge-Test.jsonl",
        "ARC-Challenge-Dev.jsonl",
        ("acc_norm", "acc"),
    ),
    "gsm8k": Task(
        "gsm8k", "gsm8k", "train.jsonl", "test.jsonl", None, ("strict_number", "flexible_number"), generate=256
    ),
    "openbookqa": Task("openbookqa", "openbookqa", "train.jsonl", "test.jsonl", "dev.jsonl", ("acc_norm", "acc")),
}
SOURCES = {
    "natural-instructions": "Super-NaturalInstructions 2.8: its folders tasks/ and splits/",
    "hellaswag": "HellaSwag: hellaswag_train.jsonl, hellaswag_val.jsonl (the test's answers are not public)",
    "arc": "ARC-V1-Feb2018-2: ARC-Challenge-Train.jsonl, -Dev.jsonl, -Test.jsonl",
    "gsm8k": "GSM8K: train.jsonl, test.jsonl",
    "openbookqa": "OpenBookQA-V1-Sep2018, Data/Main: train.jsonl, dev.jsonl, test.jsonl",
}

# The authors' rates for LoRA-RITE; the wider grid is ours.
GRID = "5e-5,1e-4,2e-4,5e-4,1e-3,2e-3"
RATES = {"rite": "2e-4,5e-4,1e-3", "adam": GRID, "lora+": GRID, "scaled-adam": GRID, "shampoo": GRID, "lamb": GRID}
INSTANCES = 100  # of each task of Super-NaturalInstructions, as Tk-Instruct takes them
WARMUP = 100
HELD_OUT = 20  # every so many-th training record, 500 at most, where no validation data are published
MOST_HELD_OUT = 500


def say(*words) -> None:
    print("reproduce:", *words, flush=True)


def read_json(path: pathlib.Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(f"reproduce: {path}: cannot be read ({error.strerror})")
    except ValueError as error:
        sys.exit(f"reproduce: {path}: is no JSON ({error})")


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text)


class Commands:
    """Runs commands, or prints them."""

    def __init__(self, dry: bool):
        self.dry = dry

    def run(self, *words) -> None:
        command = [str(word) for word in words]
        if self.dry:
            print(shlex.join(command))
            return
        say(shlex.join(command))
        with subprocess.Popen(command) as process:
            while True:  # Ctrl-C reaches the program, too, which saves before it ends
                try:
                    code = process.wait()
                    break
                except KeyboardInterrupt:
                    pass
        if code != 0:
            if code in (130, -2):
                say("stopped; the same command goes on")
                sys.exit(130)
            sys.exit(
                f"reproduce: ended with code {code}: {shlex.join(command)}\n"
                "reproduce: mend it and give the same command again, which goes on"
            )


# --- What is needed


def check_model(name: str, folder: pathlib.Path, any_model: bool) -> None:
    config = read_json(folder / "config.json")
    wrong = [
        f"{field} is {config.get(field)!r}, expected {value!r}"
        for field, value in MODELS[name].fields.items()
        if config.get(field) != value
    ]
    if wrong and not any_model:
        sys.exit(
            f"reproduce: {folder}/config.json is not that of {MODELS[name].title}: {'; '.join(wrong)}; "
            "name another folder, or allow it by --any-model"
        )
    if not (folder / "tokenizer.json").is_file():
        sys.exit(f"reproduce: {folder}/tokenizer.json: does not exist; it belongs to the model")
    index, shards = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():  # the whole file counts first
        shards = set(read_json(index)["weight_map"].values())
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        sys.exit(f"reproduce: {folder}: lacks {', '.join(missing)}; it belongs to the model")
    size = sum((folder / shard).stat().st_size for shard in shards)
    say(f"{MODELS[name].title}: {size / 1e9:.1f} GB of weights in {folder}")


def check_data(tasks: list[str], data: pathlib.Path) -> None:
    missing = {}
    for name in tasks:
        task = TASKS[name]
        for file in (task.train, task.test, task.validation):
            if file is not None and not (data / task.source / file).is_file():
                missing.setdefault(task.source, []).append(file)
    if missing:
        lines = [
            f"  {data / source}: lacks {', '.join(files)}\n    {SOURCES[source]}" for source, files in missing.items()
        ]
        sys.exit("reproduce: data are missing (leave out tasks with --tasks):\n" + "\n".join(lines))


# --- The plan: files and runs


class Plan:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.commands = Commands(options.dry_run)
        self.model = MODELS[options.setting]

    def title(self) -> str:
        return (
            f"{self.options.model}, with the settings of {self.model.title}"
            if self.options.any_model
            else self.model.title
        )

    def tokens(self, task: str, part: str) -> pathlib.Path:
        return self.options.out / "data" / f"{task}.{part}.jsonl"

    def run_folder(self, task: str, optimizer: str, rate: str, seed: int) -> pathlib.Path:
        return self.options.out / "runs" / task / optimizer / rate / f"seed-{seed}"

    # -- Data

    def inputs(self, name: str, part: str) -> list[pathlib.Path]:
        task = TASKS[name]
        file = (
            self.options.data
            / task.source
            / {"train": task.train, "test": task.test, "validation": task.validation}[part]
        )
        if task.form != "super_ni":
            return [file]
        # The split lists tasks by name; of each the first instances are taken.
        names = file.read_text(encoding="utf-8").split()
        files = []
        for each in names:
            out = self.options.out / "data" / f"super_ni.{part}" / f"{each}.json"
            files.append(out)
            if not out.is_file() and not self.commands.dry:
                content = read_json(self.options.data / task.source / "tasks" / f"{each}.json")
                content["Instances"] = content["Instances"][:INSTANCES]
                write(out, json.dumps(content))
        return files

    def prepare(self, name: str) -> None:
        task, options = TASKS[name], self.options
        parts = ["train", "test"] + (["validation"] if task.validation else [])
        for part in parts:
            out = self.tokens(name, part)
            if out.is_file():
                continue
            if not self.commands.dry:
                out.parent.mkdir(parents=True, exist_ok=True)
            whole = out.with_name(out.name.replace(".train.", ".all."))
            held_out = part == "train" and task.validation is None
            purpose = "evaluate" if part == "test" else "train"
            self.commands.run(
                options.python,
                HERE / "prepare_tasks.py",
                task.form,
                *self.inputs(name, part),
                "--model",
                options.model,
                "--out",
                whole if held_out else out,
                "--for",
                purpose,
                "--max-length",
                options.max_length,
                "--malformed",
                "skip",
            )
            if held_out and not self.commands.dry:
                self.hold_out(whole, name)

    def hold_out(self, whole: pathlib.Path, name: str) -> None:
        # Not by splitlines: a text may hold a separator that only Python takes for the end of a line.
        header, *records = whole.read_text(encoding="utf-8").rstrip("\n").split("\n")
        step = max(HELD_OUT, math.ceil(len(records) / MOST_HELD_OUT)) if len(records) >= HELD_OUT else 2
        held_out, train = records[::step], [record for at, record in enumerate(records) if at % step]
        if not held_out or not train:
            sys.exit(f"reproduce: {whole}: has {len(records)} records, too few to hold some out for validation")
        write(self.tokens(name, "validation"), "\n".join([header, *held_out]) + "\n")
        write(self.tokens(name, "train"), "\n".join([header, *train]) + "\n")  # the last: its presence says all is done
        whole.unlink()

    def steps(self, name: str) -> int:
        if self.options.steps:
            return self.options.steps
        if self.commands.dry and not self.tokens(name, "train").is_file():
            return 0  # nobody knows yet
        with self.tokens(name, "train").open(encoding="utf-8") as file:
            records = sum(1 for _ in file) - 1
        return max(1, math.ceil(self.options.epochs * records / self.options.batch))

    # -- Runs

    def train_options(self, name: str, optimizer: str, rate: str, seed: int) -> list:
        options = self.options
        steps = self.steps(name)
        words = [
            "--model",
            options.model,
            "--train",
            self.tokens(name, "train"),
            "--validation",
            self.tokens(name, "validation"),
            "--out",
            self.run_folder(name, optimizer, rate, seed),
            "--optimizer",
            optimizer,
            "--lr",
            rate,
            "--seed",
            seed,
            "--rank",
            options.rank,
            "--alpha",
            options.rank,
            "--dropout",
            "0.05",
            "--target-modules",
            options.target_modules or self.model.targets,
            "--batch",
            options.batch,
            "--micro-batch",
            options.micro_batch,
            "--steps",
            steps or "STEPS",
            "--warmup",
            min(WARMUP, steps // 10) if steps else "WARMUP",
            "--schedule",
            "linear",
            "--evaluate-every",
            max(1, steps // 10) if steps else "STEPS/10",
            "--dtype",
            options.dtype,
            "--device",
            options.device,
            "--python",
            options.python,
        ]
        if optimizer not in ("rite", "rite-qr"):
            words += ["--max-grad-norm", "1"]  # rite bounds the unmagnified gradient by itself
        return words + options.more

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

    def train(self, name: str, optimizer: str, rate: str, seed: int) -> None:
        folder = self.run_folder(name, optimizer, rate, seed)
        if self.final_line(folder) is not None:
            return
        if (folder / "run.json").is_file() and (folder / "checkpoint.pt").is_file():
            self.commands.run(self.options.finetune, "train", "--resume", "--out", folder)
        else:
            self.commands.run(
                self.options.finetune, "train", *self.train_options(name, optimizer, rate, seed), "--overwrite"
            )

    def best_rate(self, name: str, optimizer: str, rates: list[str]) -> tuple[str, float]:
        """By the loss on the validation data, at its least."""
        found = []
        for rate in rates:
            final = self.final_line(self.run_folder(name, optimizer, rate, 0)) or {}
            loss = final.get("best_validation_loss")
            found.append((loss if isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf, rate))
        loss, rate = min(found, key=lambda item: item[0])
        if len(rates) > 2 and rate in (rates[0], rates[-1]):
            say(f"{name}, {optimizer}: the best rate {rate} is an end of its grid; a wider one (--rates) may do better")
        return rate, loss

    def evaluate(self, name: str, optimizer: str, rate: str, seed: int) -> dict | None:
        task, options = TASKS[name], self.options
        folder = self.run_folder(name, optimizer, rate, seed)
        out = folder / "test.json"
        if not out.is_file():
            words = [
                options.finetune,
                "eval",
                "--model",
                options.model,
                "--adapter",
                folder / "best",
                "--data",
                self.tokens(name, "test"),
                "--batch",
                options.micro_batch or options.batch,
                "--dtype",
                options.dtype,
                "--device",
                options.device,
                "--out",
                out,
                "--python",
                options.python,
            ]
            if task.generate:
                words += ["--generate", options.generate or task.generate]
            if options.threads:
                words += ["--threads", options.threads]
            self.commands.run(*words)
        return None if self.commands.dry else read_json(out)["results"][0]

    def show_memory(self, name: str) -> None:
        """Asks the program, which reckons before it loads anything and refuses what is over the limit with the sum."""
        if self.commands.dry:
            return
        optimizer = next(iter(self.options.rates))
        folder = self.options.out / "memory"
        words = self.train_options(name, optimizer, "1e-4", 0)
        words = [str(word) for word in words]
        words[words.index("--out") + 1] = str(folder)
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
        say(f"{name}: a run takes about {sum_of[1]} of memory: {sum_of[2]}")

    # -- All of it

    def carry_out(self) -> None:
        options = self.options
        results = []
        for name in options.tasks:
            self.prepare(name)
            self.show_memory(name)
            for optimizer, rates in options.rates.items():
                for rate in rates:
                    self.train(name, optimizer, rate, 0)
                rate, loss = ("BEST", math.nan) if self.commands.dry else self.best_rate(name, optimizer, rates)
                tests = []
                for seed in range(options.seeds):
                    if seed > 0:
                        self.train(name, optimizer, rate, seed)
                    tests.append(self.evaluate(name, optimizer, rate, seed))
                if self.commands.dry:
                    continue
                results.append(
                    {
                        "model": options.setting,
                        "task": name,
                        "optimizer": optimizer,
                        "rate": rate,
                        "validation_loss": loss,
                        "tests": tests,
                    }
                )
                write(options.out / "results.json", json.dumps(results, indent=2) + "\n")
                write(options.out / "table.md", table(results, self.title()))
        if not self.commands.dry:
            print((options.out / "table.md").read_text(encoding="utf-8"), end="")
            say(f"the table: {options.out / 'table.md'}; all numbers: {options.out / 'results.json'}")


def shown(values: list[float]) -> str:
    mean = 100 * statistics.mean(values)
    return f"{mean:.2f} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def table(results: list[dict], title: str) -> str:
    lines = [
        f"{title}; scores in percent, mean ± standard deviation over the seeds",
        "",
        "| task | score | optimizer | rate | test | validation loss |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for score in TASKS[result["task"]].scores:
            values = [test[score] for test in result["tests"] if score in test]
            if values:
                lines.append(
                    f"| {result['task']} | {score} | {result['optimizer']} | {result['rate']} | "
                    f"{shown(values)} | {result['validation_loss']:.4f} |"
                )
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    sources = "\n".join(f"  {source:22}{text}" for source, text in SOURCES.items())
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce",
        description=__doc__ + sources,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What stands behind -- goes to every 'finetune train' as it is.",
    )
    parser.add_argument("setting", choices=MODELS)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json, weights, tokenizer")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for everything that is made")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of %(default)s")
    parser.add_argument("--optimizers", default=",".join(RATES), help="some of %(default)s")
    parser.add_argument(
        "--rates",
        action="append",
        default=[],
        metavar="NAME=R,R,...",
        help="another grid for an optimizer; may be given again",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the best rate (default %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="(default %(default)s; the paper also has 4 and 64)")
    parser.add_argument("--batch", type=int, default=64, help="examples a step (default %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=4, help="of them at once (default %(default)s)")
    parser.add_argument("--epochs", type=float, default=3, help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="instead of --epochs")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of an example (default %(default)s)")
    parser.add_argument("--generate", type=int, default=0, help="tokens to write, instead of each task's own number")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = LibTorch's default")
    parser.add_argument("--target-modules", help="layers with adapters, instead of the setting's own")
    parser.add_argument("--any-model", action="store_true", help="take a model that is not the setting's")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument("--finetune", default="finetune", help="the program (scripts/reproduce builds it)")
    parser.add_argument(
        "--python",
        default=os.environ.get("FINETUNE_PYTHON", sys.executable),
        help="interpreter with tokenizers (default %(default)s)",
    )
    more = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    options = parser.parse_args(arguments[: len(arguments) - len(more) - 1] if "--" in arguments else arguments)
    options.more = more + (["--threads", options.threads] if options.threads else [])
    options.tasks = options.tasks.split(",")
    for task in options.tasks:
        if task not in TASKS:
            parser.error(f"--tasks {task}: expected some of {', '.join(TASKS)}")
    grids = dict(RATES)
    for text in options.rates:
        optimizer, _, rates = text.partition("=")
        grids[optimizer] = rates
    options.rates = {}
    for optimizer in options.optimizers.split(","):
        try:
            rates = grids[optimizer].split(",")
            if not all(float(rate) > 0 for rate in rates):
                raise ValueError
        except KeyError:
            parser.error(f"--optimizers {optimizer}: has no grid; give one with --rates {optimizer}=1e-4,1e-3")
        except ValueError:
            parser.error(f"--rates {optimizer}={grids[optimizer]}: expected numbers above 0 with commas between")
        options.rates[optimizer] = rates
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected at least 1")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    check_model(options.setting, options.model, options.any_model)
    check_data(options.tasks, options.data)
    runs = len(options.tasks) * sum(len(rates) + options.seeds - 1 for rates in options.rates.values())
    say(
        f"{runs} runs; each keeps its last and its best adapter and a checkpoint with the optimizer's state in "
        f"{options.out}: up to five times the factors"
    )
    try:
        Plan(options).carry_out()
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        sys.exit(130)


if __name__ == "__main__":
    main()
