#!/usr/bin/env python3
"""The experiments of "LoRA Done RITE" (Yen et al., ICLR 2025), for those who have the weights and the data.

    scripts/reproduce gemma-2b --model ~/gemma-2b --data ~/data --out results
    scripts/reproduce official --model ~/gemma-2b --data ~/data --out results
    scripts/reproduce official --model .deps/smollm2 --data ~/data --out results --records 504 --steps 24 --batch 16

gemma-2b, gemma-7b and mt5-xxl are the paper's tasks, each trained on and measured by itself. official is the recipe of
the authors' repository for Gemma 2B, which also takes SmolLM2-135M: one adapter for all of LLM-Adapters' questions,
measured on each of their data sets by the likelihood of the right answer and by the answer that the model writes.

The data become token ids; every optimizer is trained at every rate of its grid, and at rates beyond it while the best
one is an end; the rate that does best on held-out data is trained again with other seeds; what comes out is measured
on the test data. Results are in OUT/table.md and OUT/results.json, which also say how much of the data was taken.
Stop it at any time: the same command goes on where it was, in the middle of a run. --dry-run prints the commands.

DATA holds the data sets as published, in folders of these names:
"""

import argparse
import dataclasses
import os
import pathlib
import sys

from experiments.commands import say
from experiments.inputs import find_model, find_tasks
from experiments.plan import Plan
from experiments.recipes import EXPERIMENTS, SOURCES, Contender


def make_parser() -> argparse.ArgumentParser:
    sources = "\n".join(f"  {source:22}{text}" for source, text in SOURCES.items())
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce",
        description=__doc__ + sources,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What stands behind -- goes to every 'finetune train' as it is.",
    )
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--model", type=pathlib.Path, required=True, help="folder with config.json, weights, tokenizer")
    add("--data", type=pathlib.Path, required=True, help="folder of the data sets")
    add("--out", type=pathlib.Path, required=True, help="folder for everything that is made")

    what = parser.add_argument_group("what is compared")
    add = what.add_argument
    add("--tasks", help="some of the experiment's (default: all; official: those with a test file in DATA)")
    add("--optimizers", help="some of the experiment's, or others with --rates (official: also rite-code)")
    add("--rates", action="append", default=[], metavar="NAME=R,R,...", help="another grid; may be given again")
    add("--widen", type=int, default=4, help="most rates to add at the ends of a grid of three or more (default 4)")
    add("--seeds", type=int, default=3, help="of the best rate (default %(default)s)")

    part = parser.add_argument_group("how much of it")
    add = part.add_argument
    add("--records", type=int, default=0, help="training records to take, the held-out among them; 0 = all")
    add(
        "--held-out",
        type=int,
        default=0,
        help="of them for validation (default: a twentieth, 500 at most; official: 120)",
    )
    add("--test-records", type=int, default=0, help="records of each test to take; 0 = all")
    add("--epochs", type=float, default=3, help="(default %(default)s)")
    add("--steps", type=int, default=0, help="instead of --epochs")
    add(
        "--evaluate-every",
        type=int,
        default=0,
        help="steps between validations (default: a tenth; official: 80 at most)",
    )
    add("--max-length", type=int, default=512, help="tokens of an example (default %(default)s)")
    add("--generate", type=int, default=0, help="tokens to write, instead of each task's own number")

    recipe = parser.add_argument_group("the recipe")
    add = recipe.add_argument
    add("--rank", type=int, default=16, help="(default %(default)s; the paper also has 4 and 64)")
    add("--batch", type=int, default=64, help="examples a step (default %(default)s)")
    add("--micro-batch", type=int, default=4, help="of them at once (default %(default)s)")
    add(
        "--loss",
        choices=("completion", "text"),
        help="train on answers, or on prompts too (default: text for official)",
    )
    add("--dtype", help="of the frozen weights (default: bfloat16, float32 for official)")
    add("--target-modules", help="layers with adapters, instead of the model's own")

    machine = parser.add_argument_group("running")
    add = machine.add_argument
    add("--device", default="cpu", help="cpu, cuda (default %(default)s)")
    add("--threads", type=int, default=0, help="CPU threads, 0 = LibTorch's default")
    add("--any-model", action="store_true", help="take a model that is not the experiment's")
    add("--dry-run", action="store_true", help="print the commands, run none")
    add("--finetune", default="finetune", help="the program (scripts/reproduce builds it)")
    python = os.environ.get("FINETUNE_PYTHON", sys.executable)
    add("--python", default=python, help="interpreter with tokenizers (default %(default)s)")
    return parser


def contenders(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Contender]:
    """Those that were named, or the experiment's own, with the grids that were given."""
    experiment = EXPERIMENTS[options.experiment]
    known = dict(experiment.contenders)
    for text in options.rates:
        name, _, rates = text.partition("=")
        known[name] = dataclasses.replace(known.get(name, Contender(name, "")), rates=rates)
    chosen = {}
    for name in options.optimizers.split(",") if options.optimizers else experiment.usual:
        if name not in known:
            parser.error(f"--optimizers {name}: has no grid; give one with --rates {name}=1e-4,1e-3")
        try:
            good = all(float(rate) > 0 for rate in known[name].rates.split(","))
        except ValueError:
            good = False
        if not good:
            parser.error(f"--rates {name}={known[name].rates}: expected numbers above 0 with commas between")
        chosen[name] = known[name]
    return chosen


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser()
    more = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    options = parser.parse_args(arguments[: len(arguments) - len(more) - 1] if "--" in arguments else arguments)
    experiment = EXPERIMENTS[options.experiment]
    options.more = more
    options.tasks = options.tasks.split(",") if options.tasks else []
    for task in options.tasks:
        if task not in experiment.tasks:
            parser.error(f"--tasks {task}: expected some of {', '.join(experiment.tasks)}")
    options.contenders = contenders(parser, options)
    options.loss = options.loss or experiment.loss
    options.dtype = options.dtype or experiment.dtype
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected at least 1")
    for name in ("widen", "records", "held_out", "test_records", "evaluate_every"):
        value = getattr(options, name)
        if value < 0:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least 0")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    model = find_model(options.experiment, options.model, options.any_model)
    tasks = find_tasks(options.experiment, options.tasks, options.data)
    runs = sum(len(contender.rates.split(",")) + options.seeds - 1 for contender in options.contenders.values())
    say(
        f"{len(tasks) * runs} runs, and one for each rate that is added; each keeps its last and its best adapter "
        f"and a checkpoint with the optimizer's state in {options.out}: up to five times the factors"
    )
    try:
        Plan(options, model, tasks).carry_out()
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        sys.exit(130)


if __name__ == "__main__":
    main()
