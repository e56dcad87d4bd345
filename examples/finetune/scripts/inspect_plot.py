#!/usr/bin/env python3
"""Draws what an adapter holds as a heat map, layers by kinds of modules: inspect_plot.py FIGURES.json PICTURE.png.

FIGURES.json is what `finetune inspect --json` writes."""

import json
import re
import sys


def place(module: str) -> tuple[str, int, str]:
    """The stack, the layer's number and the kind of module: ("encoder", 3, "SelfAttention.q")."""
    match = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", module)
    if match is None:
        return "", 0, module
    stack = re.sub(r"(^|\.)(model|layers|layer|block|h)(?=\.|$)", "", match[1] or "").strip(".")
    return stack, int(match[2]), re.sub(r"^layer\.\d+\.", "", match[3])


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    figures, picture = sys.argv[1:]
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        print(f"{sys.executable}: the package 'matplotlib' is missing ({error})", file=sys.stderr)
        return 1

    with open(figures, encoding="utf-8") as file:
        layers = json.load(file)["layers"]
    places = [place(layer["layer"]) for layer in layers]
    rows = list(dict.fromkeys((stack, number) for stack, number, _ in places))
    kinds = list(dict.fromkeys(kind for _, _, kind in places))
    has_base = "relative_change" in layers[0]
    panels = [
        ("relative_change", "‖ΔW‖ / ‖W‖") if has_base else ("frobenius_norm", "‖ΔW‖"),
        ("effective_rank", "effective rank of ΔW"),
        ("balance", "‖B‖ / ‖A‖"),
    ]

    size = (3.2 + len(panels) * (1 + 0.34 * len(kinds)), 2.4 + 0.24 * len(rows))
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True)
    for axis, (key, title) in zip(axes, panels):
        values = [[float("nan")] * len(kinds) for _ in rows]
        for layer, (stack, number, kind) in zip(layers, places):
            value = layer[key]
            values[rows.index((stack, number))][kinds.index(kind)] = float("nan") if value is None else value
        image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks(range(len(kinds)), kinds, rotation=90)
        axis.set_yticks(range(len(rows)), [f"{stack} {number}".strip() for stack, number in rows])
        axis.tick_params(length=0)
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("layer")
    figure.savefig(picture, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
