#!/usr/bin/env python3
"""Draws the loss curve of one run: plot.py METRICS.jsonl LOSS.png."""

import json
import sys

from smoothing import smooth


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    metrics, picture = sys.argv[1:]
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        print(f"{sys.executable}: the package 'matplotlib' is missing ({error})", file=sys.stderr)
        return 1

    with open(metrics, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    steps = [line for line in lines if "step" in line]
    final = next((line for line in lines if line.get("final")), {})
    x = [line["step"] for line in steps]
    losses = [float("nan") if line["loss"] is None else line["loss"] for line in steps]

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(x, losses, color="#9ecae1", linewidth=0.8, label="loss of each batch")
    axes.plot(x, smooth(losses), color="#08519c", linewidth=2, label="smoothed")
    validation = [line for line in steps if line.get("validation_loss") is not None]
    if validation:
        axes.plot(
            [line["step"] for line in validation],
            [line["validation_loss"] for line in validation],
            color="#31a354",
            marker="o",
            markersize=3,
            linewidth=1.5,
            label="validation",
        )
    if final.get("best_step"):
        axes.axvline(
            final["best_step"],
            color="#31a354",
            linestyle=":",
            linewidth=1.2,
            label=f"the best measurement (step {final['best_step']})",
        )
    if final.get("test_loss") is not None:  # null where the run diverged, nothing where there is no such score
        accuracy = f" (accuracy {100 * final['test_accuracy']:.1f} %)" if "test_accuracy" in final else ""
        axes.axhline(
            final["test_loss"],
            color="#d94801",
            linestyle="--",
            linewidth=1.2,
            label=f"test loss {final['test_loss']:.3f}{accuracy}",
        )
    if final:
        axes.set_title(f"{final['optimizer']}, rank {final['rank']}, learning rate {final['lr']:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
