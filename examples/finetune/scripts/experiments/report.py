"""What came out, as a table."""

import statistics

from experiments.recipes import PUBLISHED, PUBLISHED_FOR, Task


def shown(values: list[float]) -> str:
    mean = 100 * statistics.mean(values)
    return f"{mean:.2f} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def validation_loss(result: dict) -> str:
    """At the rate that was chosen; in JSON there is null where no loss was finite."""
    loss = result["rates"][result["rate"]]
    return "diverged" if loss is None else f"{loss:.4f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    return [row(*cells), "|" + len(cells) * "---|"]


def share(part: dict) -> str:
    """`{"taken": 5, "of": 7}` in words."""
    return f"{part['taken']:,}" if part["taken"] == part["of"] else f"{part['taken']:,} of {part['of']:,}"


def extent(name: str, part: dict) -> str:
    """What of the data a task was trained and measured on: Plan.extent, in words."""
    tests = ", ".join(f"{test} {share(count)}" for test, count in part["tests"].items())
    return (
        f"{name}: trained on {share(part['train'])} records ({part['held_out']:,} more held out), "
        f"{part['steps']:,} steps of {part['batch']} (epochs: {part['epochs']:.3g}), "
        f"texts of at most {part['max_length']} tokens, loss of the {part['loss']}; tests: {tests}"
    )


def rows_of_own_test(name: str, task: Task, results: list[dict]) -> list[str]:
    """A row for each score and optimizer of a task whose test is its own."""
    lines = []
    for result in results:
        for score in task.scores:
            values = [test[score] for tests in result["tests"] for test in tests.values() if score in test]
            if values:
                cells = (name, score, result["optimizer"], result["rate"], shown(values))
                lines.append(row(*cells, validation_loss(result)))
    return lines


def published(experiment: str, model: str, score: str, tests: list[str]) -> list[str]:
    """The authors' rows, where there are numbers to be compared."""
    if (experiment, model, score) != PUBLISHED_FOR:
        return []
    lines = []
    for optimizer, values in PUBLISHED.items():
        there = [values[test] for test in tests]
        cells = [f"{value:.2f}" for value in [*there, statistics.mean(there)]]
        lines.append(row(score, f"{optimizer}, published", "", *cells, ""))
    return lines


def rows_of_several(experiment: str, model: str, task: Task, results: list[dict]) -> list[str]:
    """A table with a column for each test, and the mean of all of them."""
    tests = list(task.tests)
    lines = head("score", "optimizer", "rate", *tests, "mean", "validation loss")
    for score in task.scores:
        for result in results:
            columns = [[seed[test][score] for seed in result["tests"]] for test in tests]
            columns.append([statistics.mean(values) for values in zip(*columns)])
            cells = (score, result["optimizer"], result["rate"], *map(shown, columns))
            lines.append(row(*cells, validation_loss(result)))
        lines += published(experiment, model, score, tests)
    return lines


def table(report: dict, tasks: dict[str, Task]) -> str:
    """Of what results.json holds. `report["model"]` is empty for a model that is none of the experiment's."""
    lines = [f"{report['title']}; scores in percent, mean ± standard deviation over the seeds", ""]
    lines += [f"- {extent(name, part)}" for name, part in report["extent"].items()] + [""]
    of = {name: [result for result in report["results"] if result["task"] == name] for name in tasks}
    own = [
        line for name, task in tasks.items() if name in task.tests for line in rows_of_own_test(name, task, of[name])
    ]
    if own:
        lines += head("task", "score", "optimizer", "rate", "test", "validation loss") + own
    for name, task in tasks.items():
        if name not in task.tests and of[name]:
            lines += rows_of_several(report["experiment"], report["model"], task, of[name])
    return "\n".join(lines) + "\n"
