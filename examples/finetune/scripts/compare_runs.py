#!/usr/bin/env python3
"""Sets runs side by side: compare_runs.py RUN_FOLDER... --picture PICTURE.png

Prints a table of the runs, and draws each optimizer's loss curves in a panel of its own. Where an optimizer was started
in two equivalent ways (finetune train --init-scale), the gap between its two curves is measured and drawn below them.
"""

import argparse
import json
import os
import sys

from smoothing import smooth

NAMES = {"rite": "LoRA-RITE", "adam": "Adam", "adamw": "AdamW"}
INK, USUAL, SCALED = "#333333", "#0b5fa5", "#f28e2b"


def read_run(folder: str) -> dict:
    """The final line of a run's metrics, with its losses (NaN where one was not finite) as "losses"."""
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: cannot be read ({error}); the folder of a finished run of finetune is expected")
    if not lines or not lines[-1].get("final"):
        sys.exit(f"{path}: the run is not finished; go on with: finetune train --resume --out {folder}")
    losses = [float("nan") if line["loss"] is None else line["loss"] for line in lines if "step" in line]
    return {**lines[-1], "losses": losses}


def start_of(run: dict) -> str:
    return "usual" if run["init_scale"] == 1 else f"A × {run['init_scale']:g}"


def name_of(optimizer: str) -> str:
    return NAMES.get(optimizer, optimizer)


def accuracy_of(run: dict) -> str:
    """A classifier's, or that of choices; "-" where there is none."""
    for name in ("test_accuracy", "test_acc"):
        if run.get(name) is not None:
            return f"{100 * run[name]:.1f} ± {100 * run[name + '_error']:.1f} %"
    return "-"


def loss_of(run: dict) -> str:
    if "test_loss" not in run:
        return "-"
    return "diverged" if run["test_loss"] is None else f"{run['test_loss']:.4f}"


def are_equivalent(runs: list[dict]) -> bool:
    """Two runs that differ in their start alone?"""
    return (
        len(runs) == 2
        and runs[0]["init_scale"] != runs[1]["init_scale"]
        and all(runs[0][name] == runs[1][name] for name in ("lr", "seed", "rank", "steps"))
    )


def table(runs: list[dict]) -> str:
    header = ["optimizer", "start", "lr", "test accuracy", "test loss", "ms/step", "optimizer share", "optimizer state"]
    rows = [header]
    for run in runs:
        rows.append(
            [
                name_of(run["optimizer"]),
                start_of(run),
                f"{run['lr']:g}",
                accuracy_of(run),
                loss_of(run),
                f"{run['ms_per_step']:.0f}",
                f"{100 * run['optimizer_share']:.1f} %",
                f"{run['optimizer_state_mb']:.2f} MB",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def gap(first: dict, second: dict) -> list[float]:
    return [abs(left - right) for left, right in zip(first["losses"], second["losses"])]


def draw(panels: list[tuple[str, list[dict]]], picture: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    figure, axes = plt.subplots(
        2,
        len(panels),
        figsize=(5.2 * len(panels), 5.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [2.6, 1]},
    )
    for column, (optimizer, runs) in enumerate(panels):
        curve, difference = axes[0][column], axes[1][column]
        for run in runs:
            is_usual = run["init_scale"] == 1
            # Wide and pale below, thin and dark above: where the two coincide, both are seen.
            style = {"color": USUAL, "linewidth": 1.8} if is_usual else {"color": SCALED, "linewidth": 6, "alpha": 0.7}
            label = "usual start" if is_usual else f"equivalent start, {start_of(run)} (same ΔW = 0)"
            curve.plot(
                range(1, len(run["losses"]) + 1),
                smooth(run["losses"]),
                label=label,
                zorder=2 + is_usual,
                solid_capstyle="round",
                **style,
            )
        curve.set_title(f"{name_of(optimizer)}, learning rate {runs[0]['lr']:g}", fontweight="bold")
        curve.grid(alpha=0.25)
        difference.grid(alpha=0.25)
        difference.set_xlabel("step")
        if are_equivalent(runs):
            gaps = gap(*runs)
            difference.semilogy(range(1, len(gaps) + 1), [max(value, 1e-9) for value in gaps], color=INK, linewidth=1)
            difference.set_title(f"gap between the two losses: at most {max(gaps):.1g}", fontsize=10, loc="left")
    axes[0][0].set_ylabel("training loss (smoothed)")
    axes[1][0].set_ylabel("gap")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(picture, dpi=160, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="an --out folder of finetune train")
    parser.add_argument("--picture", help="PNG to draw")
    options = parser.parse_args()

    runs = [read_run(folder) for folder in options.runs]
    print(table(runs))
    panels = [
        (optimizer, [run for run in runs if run["optimizer"] == optimizer])
        for optimizer in dict.fromkeys(run["optimizer"] for run in runs)
    ]
    for optimizer, members in panels:
        if are_equivalent(members):
            print(f"{name_of(optimizer)}: the losses from the two starts differ by at most {max(gap(*members)):.2g}")
    if options.picture:
        draw(panels, options.picture)


if __name__ == "__main__":
    main()
