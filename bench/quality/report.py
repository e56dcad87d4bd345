#!/usr/bin/env python3
"""Makes tables and pictures of what study.py ran: report.py FOLDER reads FOLDER/runs.jsonl and runs.jsonl.xz.

Writes FOLDER/study.md and FOLDER/study-*.png, of whatever is there: a study that is under way can be looked at.
"""

import math
import pathlib
import sys
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from grid import CONTENDERS, MIDDLE_RANK, OPTIONS, TASKS
from tables import Entry, load, rank_table, table, title

INK = "#333333"
OPTIMIZERS = [name for name in CONTENDERS if name not in OPTIONS]
BESIDE_OPTIONS = OPTIMIZERS[:3]  # LoRA-RITE, bounded and not, and Adam, shown in the picture of the options, too
PALETTE = [
    "#0b5fa5",
    "#f28e2b",
    "#c9a227",
    "#59a14f",
    "#b07aa1",
    "#9c755f",
    "#76b7b2",
    "#e15759",
    "#9a9a9a",
    "#d37295",
    "#333333",
    "#7ab6e0",
    "#8c2d04",
    "#1b7837",
    "#6a51a3",
]
COLORS = dict(zip(OPTIMIZERS, PALETTE)) | dict(zip(OPTIONS, PALETTE[len(BESIDE_OPTIONS) :]))

Line = tuple[list[float], list[float]]


def draw(
    cells: dict[tuple, dict[str, Entry]],
    names: list[str],
    line: Callable[[tuple, Entry], Line | None],
    labels: tuple[str, str],
    is_logarithmic: Callable[[tuple], tuple[bool, bool]],
    path: pathlib.Path,
) -> None:
    """A panel a cell with a line for each of `names`, where `line` gives one."""
    columns = min(len(cells), 4)
    rows = math.ceil(len(cells) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.2 * columns, 4.4 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(cells) :]:
        axes.set_visible(False)
    handles = {}
    for axes, (cell, entries) in zip(grid.flat, cells.items()):
        for name in names:
            points = line(cell, entries[name]) if name in entries else None
            if points:
                wide = name.startswith("rite")
                (handles[name],) = axes.plot(
                    *points,
                    marker="o",
                    markersize=3,
                    color=COLORS[name],
                    linewidth=2.4 if wide else 1.2,
                    zorder=3 if wide else 2,
                )
        for wanted, set_scale in zip(is_logarithmic(cell), (axes.set_xscale, axes.set_yscale)):
            set_scale("log" if wanted else "linear")
        axes.set_title(title(cell), fontsize=10)
        axes.set_xlabel(labels[0])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(labels[1])
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(3 * columns, 8, len(handles)),
        frameon=False,
    )
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def draw_rates(cells: dict[tuple, dict[str, Entry]], names: list[str], path: pathlib.Path) -> None:
    draw(
        cells,
        names,
        rates_line,
        ("learning rate", "validation loss"),
        lambda cell: (True, not TASKS[cell[0]].is_text),
        path,
    )


def rates_line(_: tuple, entry: Entry) -> Line:
    """Loss of the search against the rate: how good at its best, and how hard to miss."""
    rates = [rate for rate in sorted(entry.search) if math.isfinite(entry.search_loss(rate))]
    return rates, [entry.search_loss(rate) for rate in rates]


def curve_line(cell: tuple, entry: Entry) -> Line | None:
    """What was left to learn after every part of the steps, at the best rate."""
    if not entry.finished:
        return None
    curve = entry.curve()
    return [TASKS[cell[0]].steps * (index + 1) / len(curve) for index in range(len(curve))], curve


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    plt.rcParams.update(
        {
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    cells = {
        cell: entries for cell, entries in load(folder).items() if any(entry.finished for entry in entries.values())
    }
    if not cells:
        sys.exit(f"{folder}/runs.jsonl: nothing is finished yet; let study.py go on")
    text = [f"### {title(cell)}\n\n{table(entries)}\n" for cell, entries in cells.items()]
    for task in TASKS:
        if ranks := rank_table(cells, task):
            text.append(
                f"### {TASKS[task].title}, over the ranks\n\n"
                f"Validation loss at the best rate, and at that of rank {MIDDLE_RANK}.\n\n{ranks}\n"
            )
    (folder / "study.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
    usual = {cell: entries for cell, entries in cells.items() if cell[1] == 16 and cell[2] == "usual"}
    for model in ("regression", "minilm", "smollm2"):
        shown = {cell: entries for cell, entries in usual.items() if TASKS[cell[0]].model == model}
        if shown:
            draw_rates(shown, OPTIMIZERS, folder / f"study-{model}-rates.png")
            draw(
                shown,
                OPTIMIZERS,
                curve_line,
                ("step", "error, or training loss"),
                lambda cell: (False, True),
                folder / f"study-{model}-curves.png",
            )
    shown = {cell: entries for cell, entries in usual.items() if not entries.keys().isdisjoint(OPTIONS)}
    if shown:
        draw_rates(shown, [*BESIDE_OPTIONS, *OPTIONS], folder / "study-options-rates.png")


if __name__ == "__main__":
    main()
