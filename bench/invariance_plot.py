#!/usr/bin/env python3
"""Draws what bench/invariance wrote: invariance_plot.py FOLDER makes invariance.png and feature_learning.png there."""

import csv
import math
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, FACTOR_A, FACTOR_B = "#333333", "#0b5fa5", "#f28e2b"
NAMES = {
    "rite": "LoRA-RITE",
    "rite-qr": "LoRA-RITE, QR",
    "scaled-gd": "scaled gradient descent",
    "adam": "Adam",
    "adamw": "AdamW",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
    "shampoo": "Shampoo",
    "lamb": "LAMB",
    "lora+": "LoRA+",
    "scaled-adam": "scaled Adam",
    "muon": "Muon",
    "soap": "SOAP",
    "polora": "PoLoRA",
    "lora-muon": "LoRA-Muon",
    "lora-tsd": "LoRA-TSD",
    "altlora": "AltLoRA",
}
COLORS = {
    "rite": "#0b5fa5",
    "rite-qr": "#76b7e5",
    "scaled-gd": "#2a9d5c",
    "adam": "#f28e2b",
    "adamw": "#f7c27f",
    "adagrad": "#c9a227",
    "rmsprop": "#8c564b",
    "sgd": "#333333",
    "shampoo": "#b07aa1",
    "lamb": "#d62728",
    "lora+": "#e377c2",
    "scaled-adam": "#17a2a2",
    "muon": "#7f7f7f",
    "soap": "#bcbd22",
    "polora": "#7b4ab8",
    "lora-muon": "#a6d854",
    "lora-tsd": "#1b7837",
    "altlora": "#5e3c1f",
}
MARKERS = {
    "rite": "o",
    "rite-qr": ".",
    "scaled-gd": "s",
    "lamb": "v",
    "muon": "D",
    "sgd": "x",
    "soap": "^",
    "shampoo": "P",
    "polora": "*",
    "lora-muon": "<",
    "lora-tsd": ">",
    "altlora": "p",
}
ROUND_OFF = {"double": 2.0**-53, "float": 2.0**-24}
INFINITE = 1e8  # where infinite differences are drawn


def load(folder: str, name: str) -> list[dict]:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        sys.exit(f"{path}: cannot be read ({error}); bench/invariance --out {folder} writes it")
    words = ("optimizer", "kind", "dtype", "start")
    return [{key: value if key in words else float(value) for key, value in row.items()} for row in rows]


def draw_invariance(rows: list[dict], picture: str) -> None:
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    kinds = {"scaling": "scaling by a number", "diagonal": "diagonal T", "general": "general T"}
    ticks = {"double": [1e-16, 1e-12, 1e-8, 1e-4, 1, 1e4], "float": [1e-7, 1e-5, 1e-3, 1e-1, 1e1, 1e3, 1e5]}
    figure, axes = plt.subplots(2, 4, figsize=(15, 9), layout="constrained")
    for line, (dtype, round_off) in enumerate(ROUND_OFF.items()):
        places = ticks[dtype] + [INFINITE]
        names = [f"$10^{{{round(math.log10(tick))}}}$" for tick in ticks[dtype]] + ["∞"]
        for panel, (kind, title) in zip(axes[line], kinds.items()):
            for optimizer in optimizers:
                # By the number 1, or a diagonal T with κ = 1, nothing is changed.
                points = [
                    (row["magnitude"], min(row["after_all_steps"], INFINITE))
                    for row in rows
                    if (row["optimizer"], row["kind"], row["dtype"]) == (optimizer, kind, dtype)
                    and (kind == "general" or row["magnitude"] > 1)
                ]
                panel.plot(
                    *zip(*points),
                    label=NAMES[optimizer],
                    linewidth=1.5,
                    markersize=5,
                    color=COLORS[optimizer],
                    marker=MARKERS.get(optimizer, "o"),
                )
            ends = [1, 1e6]
            panel.plot(
                ends,
                [round_off * (1 if kind == "scaling" else x) for x in ends],
                color=INK,
                linestyle="--",
                linewidth=1,
                label="unit round-off × κ(T)",
            )
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_yticks(places, names)
            panel.set_xlabel("the number" if kind == "scaling" else "κ(T)")
            panel.set_title(f"{title}, {dtype}", fontsize=11)
        axes[line][0].set_ylabel("difference of ΔW after 20 steps ÷ way of ΔW")
        rotation = axes[line][3]
        for place, optimizer in enumerate(optimizers):
            differences = [
                min(row["after_all_steps"], INFINITE)
                for row in rows
                if (row["optimizer"], row["kind"], row["dtype"]) == (optimizer, "rotation", dtype)
            ]
            rotation.plot(
                differences,
                [place],
                linestyle="none",
                markersize=6,
                color=COLORS[optimizer],
                marker=MARKERS.get(optimizer, "o"),
            )
        rotation.axvline(round_off, color=INK, linestyle="--", linewidth=1)
        rotation.set_yticks(range(len(optimizers)), [NAMES[optimizer] for optimizer in optimizers], fontsize=9)
        rotation.invert_yaxis()
        rotation.set_xscale("log")
        rotation.set_xlim(round_off / 4, 4)
        rotation.set_xlabel("difference ÷ way")
        rotation.set_title(f"rotation, {dtype}", fontsize=11)
        for panel in axes[line]:
            panel.minorticks_off()
            panel.grid(alpha=0.25)
    handles, labels = axes[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the least-squares line through the logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / sum((a - mean_u) ** 2 for a in u)


def draw_feature_learning(rows: list[dict], picture: str) -> None:
    settings = list(dict.fromkeys((row["optimizer"], row["exponent"]) for row in rows))
    starts = {"random_a": "A random, B = 0", "random_b": "B random, A = 0"}
    contributions = {"of_a": ("B ΔA x", FACTOR_A, "o"), "of_b": ("ΔB A x", FACTOR_B, "s")}
    figure, axes = plt.subplots(
        len(starts), len(settings), figsize=(13, 6.4), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for line, (start, words) in enumerate(starts.items()):
        for panel, (optimizer, exponent) in zip(axes[line], settings):
            chosen = [
                row for row in rows if (row["start"], row["optimizer"], row["exponent"]) == (start, optimizer, exponent)
            ]
            widths = [row["width"] for row in chosen]
            slopes = []
            for key, (label, color, marker) in contributions.items():
                values = [row[key] for row in chosen]
                panel.plot(widths, values, color=color, marker=marker, markersize=5, linewidth=1.8, label=label)
                slopes.append(f"{label}: slope {slope(widths, values):.2f}".replace("-", "−"))
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.grid(alpha=0.25)
            panel.set_xticks([64, 256, 1024, 4096], ["64", "256", "1024", "4096"])
            panel.text(0.03, 0.04, "\n".join(slopes), transform=panel.transAxes, fontsize=9)
            rate = "1/√n" if exponent == 0.5 else "1/n"
            rates = f"rate of A ∝ {rate}, of B constant" if optimizer == "lora+" else f"rate ∝ {rate}"
            if line == 0:
                panel.set_title(f"{NAMES[optimizer]}\n{rates}", fontsize=11)
            if line == len(starts) - 1:
                panel.set_xlabel("width n")
        axes[line][0].set_ylabel(f"{words}\nRMS of the change in a step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    draw_invariance(load(folder, "invariance.csv"), os.path.join(folder, "invariance.png"))
    draw_feature_learning(load(folder, "feature_learning.csv"), os.path.join(folder, "feature_learning.png"))


if __name__ == "__main__":
    main()
