"""The tables of what study.py ran, best first: of a cell, and over the ranks."""

import collections
import math
import pathlib
import statistics

from grid import CONTENDERS, MIDDLE_RANK, TASKS
from study import geometric_mean, read_runs

BASELINE = "adam"


class Entry:
    """One contender in one cell (task, rank, start)."""

    def __init__(self, task: str, runs: list[dict]):
        self.is_text = TASKS[task].is_text
        self.search: dict[float, list[dict]] = collections.defaultdict(list)
        for run in runs:
            if run["split"] == "validation":
                self.search[run["lr"]].append(run)
        by_rate: dict[float, list[dict]] = collections.defaultdict(list)
        for run in runs:
            if run["split"] == "test":
                by_rate[run["lr"]].append(run)
        self.rate, self.test = max(by_rate.items(), key=lambda item: len(item[1]), default=(math.nan, []))
        self.test.sort(key=lambda run: run["seed"])

    @property
    def finished(self) -> bool:
        return len(self.test) >= 3

    def mean(self, values: list[float]) -> float:
        return statistics.mean(values) if self.is_text else geometric_mean(values)

    def search_loss(self, rate: float) -> float:
        losses = [run["test_loss"] for run in self.search[rate]]
        return math.inf if any(loss is None or not math.isfinite(loss) for loss in losses) else self.mean(losses)

    @property
    def has_accuracy(self) -> bool:
        return all("test_accuracy" in run for run in self.test)

    def losses(self) -> list[float]:
        return [math.inf if run["test_loss"] is None else run["test_loss"] for run in self.test]

    def curve(self) -> list[float]:
        """Mean over the seeds of the training loss (text) or the error (regression), at equal distances."""
        return [
            self.mean([math.inf if value is None else value for value in values])
            for values in zip(*(run["curve"] for run in self.test))
        ]

    def good_rates(self) -> str:
        """The rates of the search with nearly the best loss: 5 % more, or √10 times the error."""
        rates = sorted(self.search)
        most = (1.05 if self.is_text else math.sqrt(10)) * min(map(self.search_loss, rates))
        good = [rate for rate in rates if self.search_loss(rate) <= most]
        return f"{good[0]:.0e} – {good[-1]:.0e}" if len(good) > 1 else f"{good[0]:.0e}"

    def against(self, other: "Entry") -> str:
        """Paired over the seeds, with its standard error: the same seed means the same data."""
        ours = {run["seed"]: run for run in self.test}
        pairs = [(ours[run["seed"]], run) for run in other.test if run["seed"] in ours]
        if len(pairs) < 2 or other is self:
            return ""
        if self.is_text and self.has_accuracy:
            gaps = [100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in pairs]
            return f"{statistics.mean(gaps):+.1f} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.1f} points"
        if any(run["test_loss"] is None for pair in pairs for run in pair):
            return "diverged"
        if self.is_text:
            gaps = [a["test_loss"] - b["test_loss"] for a, b in pairs]
            return f"{statistics.mean(gaps):+.3f} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.3f}"
        gaps = [math.log(a["test_loss"] / b["test_loss"]) for a, b in pairs]
        spread = math.exp(statistics.stdev(gaps) / math.sqrt(len(gaps)))
        return f"× {math.exp(statistics.mean(gaps)):.2g} (×/÷ {spread:.2f})"

    def share_of_steps(self, other: "Entry") -> str:
        """When its curve first lies below where the other's ends, in percent of the steps."""
        goal = other.curve()[-1]
        curve = self.curve()
        reached = [index for index, value in enumerate(curve) if value <= goal]
        return f"{100 * (reached[0] + 1) / len(curve):.0f} %" if reached else "never"


def load(folder: pathlib.Path) -> dict[tuple, dict[str, Entry]]:
    """Cell (task, rank, start) → contender → entry, in the study's order."""
    groups: dict[tuple, dict[str, list[dict]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in read_runs(folder / "runs.jsonl"):
        if run["contender"] in CONTENDERS and run["task"] in TASKS:
            groups[run["task"], run["rank"], run["start"]][run["contender"]].append(run)
    order = {name: index for index, name in enumerate(TASKS)}
    cells = sorted(groups, key=lambda cell: (order[cell[0]], cell[2] == "lopsided", cell[1] != MIDDLE_RANK, cell[1]))
    return {
        cell: {name: Entry(cell[0], groups[cell][name]) for name in CONTENDERS if name in groups[cell]}
        for cell in cells
    }


def title(cell: tuple) -> str:
    task, rank, start = cell
    return f"{TASKS[task].title}, rank {rank}" + (", lopsided start (A × 10)" if start == "lopsided" else "")


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def table(entries: dict[str, Entry]) -> str:
    """Best first."""
    finished = {name: entry for name, entry in entries.items() if entry.finished}
    any_entry = next(iter(finished.values()))
    accuracies = {}
    if any_entry.is_text and any_entry.has_accuracy:
        accuracies = {"test_accuracy": "test accuracy", "best_accuracy": "best on the way"}
        accuracies = {field: name for field, name in accuracies.items() if field in any_entry.test[0]}
    baseline = finished.get(BASELINE)
    rows = [
        [
            "optimizer",
            "best rate",
            "good rates",
            *accuracies.values(),
            "test loss" if any_entry.is_text else "error",
            "against Adam",
            "steps to Adam's end",
        ]
    ]
    for name, entry in sorted(finished.items(), key=lambda item: entry_mean(item[1])):
        losses = entry.losses()
        diverged = sum(not math.isfinite(loss) for loss in losses)
        if diverged:
            rows.append([name, f"{entry.rate:.1e}", entry.good_rates(), f"diverged ({diverged} of {len(losses)})"])
            rows[-1] += [""] * (len(rows[0]) - len(rows[-1]))
            continue
        row = [name, f"{entry.rate:.1e}", entry.good_rates()]
        for field in accuracies:
            values = [100 * run[field] for run in entry.test]
            row.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %")
        if entry.is_text:
            row.append(f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}")
        else:
            spread = math.exp(statistics.stdev(math.log(max(loss, 1e-30)) for loss in losses))
            row.append(f"{geometric_mean(losses):.1e} (×/÷ {spread:.2f})")
        rows.append(row + ([entry.against(baseline), entry.share_of_steps(baseline)] if baseline else ["", ""]))
    return markdown(rows)


def rank_table(cells: dict[tuple, dict[str, Entry]], task: str) -> str:
    """Over the ranks, usual start: the search's loss at the best rate, that rate, and the loss at rank 16's rate."""
    entries = {cell[1]: cells[cell] for cell in sorted(cells) if cell[0] == task and cell[2] == "usual"}
    names = [name for name in CONTENDERS if all(name in of_rank for of_rank in entries.values())]
    if len(entries) < 3 or MIDDLE_RANK not in entries or not names:
        return ""
    rows = [["optimizer", *(f"r = {rank}" for rank in entries)]]
    for name in names:
        kept = min(entries[MIDDLE_RANK][name].search, key=entries[MIDDLE_RANK][name].search_loss)
        row = [name]
        for of_rank in entries.values():
            entry = of_rank[name]
            best = min(entry.search, key=entry.search_loss)
            there = f"{entry.search_loss(kept):.2g}" if kept in entry.search else "?"
            row.append(f"{entry.search_loss(best):.2g} at {best:.1e}, {there}")
        rows.append(row)
    return markdown(rows)


def entry_mean(entry: Entry) -> float:
    return entry.mean(entry.losses())
