"""Whether model and data are there, and which they are."""

import pathlib
import sys

from experiments.commands import read_json, say
from experiments.recipes import COMMONSENSE, EXPERIMENTS, MODELS, PAPER_TASKS, SOURCES, Task, commonsense


def find_model(experiment: str, folder: pathlib.Path, any_model: bool) -> str:
    """Which of the experiment's models lies in the folder; the first of them for another one that is allowed."""
    names = EXPERIMENTS[experiment].models
    config = read_json(folder / "config.json")
    wrong = {
        name: [
            f"{field} is {config.get(field)!r}, expected {value!r}"
            for field, value in MODELS[name].fields.items()
            if config.get(field) != value
        ]
        for name in names
    }
    found = next((name for name in names if not wrong[name]), names[0])
    if wrong[found] and not any_model:
        sys.exit(
            f"reproduce: {folder}/config.json is not that of "
            + ", nor that of ".join(f"{MODELS[name].title}: {'; '.join(wrong[name])}" for name in names)
            + "; name another folder, or allow it by --any-model"
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
    say(f"{MODELS[found].title}: {size / 1e9:.1f} GB of weights in {folder}")
    return found


def find_tasks(experiment: str, names: list[str], data: pathlib.Path) -> dict[str, Task]:
    """The tasks to train on; without names all of the paper's, and of the official recipe's those with a test."""
    if experiment != "official":
        tasks = {name: PAPER_TASKS[name] for name in names or PAPER_TASKS}
    else:
        tests = commonsense(list(COMMONSENSE), data).tests
        there = [name for name, file in tests.items() if (data / "commonsense" / file).is_file()]
        tasks = {"commonsense": commonsense(names or there or list(COMMONSENSE), data)}
    missing: dict[str, list[str]] = {}
    for task in tasks.values():
        for file in task.files():
            if not (data / task.source / file).is_file():
                missing.setdefault(task.source, []).append(file)
    if missing:
        lines = [
            f"  {data / source}: lacks {', '.join(files)}\n    {SOURCES[source]}" for source, files in missing.items()
        ]
        sys.exit("reproduce: data are missing (leave out tasks with --tasks):\n" + "\n".join(lines))
    return tasks
