#!/usr/bin/env python3
"""Finds good learning rates: trains at every rate with every seed, and prints a Markdown table.

    search_rates.py --finetune build/release/examples/finetune/finetune --model .deps/minilm --train train.tsv --out DIR

Rates are judged on a part of the training data that is held out for it, never on the test data. DIR/runs.jsonl keeps
one line a run; a search that was stopped goes on from there, and one that is done prints its table again. Arguments
after '--' are handed to every run.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys

RATES = {
    "rite": [1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3],
    "adam": [3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3],
}


def split(train: str, folder: str, size: int) -> tuple[str, str]:
    """Writes the training data without, and the `size` examples held out, always the same ones."""
    with open(train, encoding="utf-8", newline="\n") as file:
        lines = [line for line in file.read().split("\n") if line.strip()]
    if size >= len(lines):
        sys.exit(f"{train}: has {len(lines)} examples, so {size} cannot be held out; choose a smaller --held-out")
    random.Random(0).shuffle(lines)
    paths = os.path.join(folder, "train.tsv"), os.path.join(folder, "held-out.tsv")
    for path, part in zip(paths, (lines[size:], lines[:size])):
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in part)
    return paths


def read_lines(path: str) -> list[dict]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(options: argparse.Namespace, data: tuple[str, str], optimizer: str, rate: float, seed: int) -> dict:
    """The final line of one run. All runs share a folder, hence their tokens."""
    folder = os.path.join(options.out, "run")
    command = [
        options.finetune,
        "train",
        "--model",
        options.model,
        "--train",
        data[0],
        "--test",
        data[1],
        "--out",
        folder,
        "--overwrite",
        "--checkpoint-every",
        "0",
        "--optimizer",
        optimizer,
        "--lr",
        repr(rate),
        "--seed",
        str(seed),
        "--steps",
        str(options.steps),
        "--batch",
        str(options.batch),
        *options.extra,
    ]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
        sys.exit("a run failed (above): " + " ".join(command))
    return {**read_lines(os.path.join(folder, "metrics.jsonl"))[-1], "extra": options.extra}


def table(runs: list[dict]) -> str:
    """Mean ± standard deviation over the seeds, and the best rate of each optimizer in bold (by loss)."""
    rows = ["| optimizer | rate | seeds | held-out loss | held-out accuracy |", "|---|---|---|---|---|"]

    def spread(values: list[float], factor: float, digits: int) -> str:
        text = f"{factor * statistics.mean(values):.{digits}f}"
        return text + (f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")

    def loss(group: list[dict]) -> float:
        losses = [run["test_loss"] for run in group]
        return float("inf") if None in losses else statistics.mean(losses)

    for optimizer in sorted({run["optimizer"] for run in runs}):
        rates = sorted({run["lr"] for run in runs if run["optimizer"] == optimizer})
        groups = {rate: [r for r in runs if r["optimizer"] == optimizer and r["lr"] == rate] for rate in rates}
        best = min(rates, key=lambda rate: loss(groups[rate]))
        for rate, group in groups.items():
            mark = "**" if rate == best else ""
            loss_text = "diverged" if loss(group) == float("inf") else spread([r["test_loss"] for r in group], 1, 4)
            accuracy = spread([r["test_accuracy"] for r in group], 100, 1)
            rows.append(f"| {optimizer} | {mark}{rate:g}{mark} | {len(group)} | {loss_text} | {accuracy} % |")
    return "\n".join(rows)


def main() -> None:
    arguments, extra = sys.argv[1:], []
    if "--" in arguments:
        place = arguments.index("--")
        arguments, extra = arguments[:place], arguments[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetune", required=True, help="the program")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--train", required=True, help="training data, label TAB text")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--held-out", type=int, default=1500, help="examples to judge by (default %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    for optimizer, rates in RATES.items():
        parser.add_argument(
            f"--{optimizer}-rates",
            type=float,
            nargs="*",
            default=rates,
            metavar="RATE",
            help=f"(default {' '.join(f'{rate:g}' for rate in rates)})",
        )
    options = parser.parse_args(arguments)
    options.extra = extra

    os.makedirs(options.out, exist_ok=True)
    data = split(options.train, options.out, options.held_out)
    log = os.path.join(options.out, "runs.jsonl")
    # Seeds outside, rates inside: a search that is stopped early has seen every rate.
    wanted = [
        {
            "optimizer": optimizer,
            "lr": rate,
            "seed": seed,
            "steps": options.steps,
            "batch": options.batch,
            "test_examples": options.held_out,
            "extra": extra,
        }
        for seed in options.seeds
        for optimizer in RATES
        for rate in getattr(options, f"{optimizer}_rates")
    ]
    done = read_lines(log)
    runs = []
    for number, setting in enumerate(wanted, 1):
        found = next((line for line in done if all(line.get(key) == value for key, value in setting.items())), None)
        if found is None:
            found = run(options, data, setting["optimizer"], setting["lr"], setting["seed"])
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            loss = "diverged" if found["test_loss"] is None else f"loss {found['test_loss']:.4f}"
            print(
                f"{number}/{len(wanted)}: {setting['optimizer']} {setting['lr']:g} seed {setting['seed']}: {loss}, "
                f"accuracy {100 * found['test_accuracy']:.1f} %",
                file=sys.stderr,
                flush=True,
            )
        runs.append(found)
    print(table(runs))


if __name__ == "__main__":
    main()
