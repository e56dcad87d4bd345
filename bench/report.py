#!/usr/bin/env python3
"""Makes a report of what scripts/bench measured: report.py FOLDER writes FOLDER/report.md and pictures beside it."""

import glob
import json
import os
import platform
import statistics
import sys
from datetime import date

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK, RITE, ADAMW, FUSED = "#333333", "#0b5fa5", "#f28e2b", "#9a9a9a"
COLORS = {"rite": RITE, "adamw": ADAMW, "fused_adamw": FUSED, "adam": "#c9a227"}
LABELS = {
    "rite": "LoRA-RITE",
    "adamw": "torch::optim::AdamW",
    "fused_adamw": "at::_fused_adamw_",
    "adam": "torch::optim::Adam",
}


def load(folder: str, name: str) -> list[dict]:
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def machine() -> str:
    """How many processors of which kind. A virtual machine names only who made them; family and model tell more."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        pairs = [line.split(":", 1) for line in file if ":" in line]
    values: dict[str, list[str]] = {}
    for key, value in pairs:
        values.setdefault(key.strip(), []).append(value.strip())
    names = values.get("model name") or [platform.processor() or platform.machine()]
    number = ", ".join(f"{key} {values[key][0]}" for key in ("cpu family", "model") if key in values)
    flags = values.get("flags", [""])[0].split()
    widest = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "SSE"
    return f"{len(names)} × {names[0]} ({number or platform.machine()}, {widest})"


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def filled(rows: list[list[str]]) -> list[list[str]]:
    """The table without the columns that have nothing below their heading."""
    columns = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in columns] for row in rows]


def shape_of(case: str) -> tuple[int, ...]:
    return tuple(map(int, case.split("x")))


def words(case: str) -> str:
    pairs, width_in, width_out, rank = shape_of(case)
    return f"{pairs} × ({width_in}, {width_out}) × {rank}"


class Times:
    """Medians by suite, case and contender."""

    def __init__(self, results: list[dict]):
        self.results = results

    def cases(self, suite: str) -> list[str]:
        return list(dict.fromkeys(r["case"] for r in self.results if r["suite"] == suite))

    def of(self, suite: str, case: str) -> dict[str, dict]:
        return {r["contender"]: r for r in self.results if r["suite"] == suite and r["case"] == case}


def milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g}"


def targets(times: Times, peers: list[dict]) -> str:
    peer_name = "pytorch_optimizer.LoRARite"
    header = ["LoRA-RITE ms", "AdamW ms", "fused AdamW ms", "÷ AdamW", "÷ fused", f"{peer_name} ms", "times faster"]
    rows = [["pairs × (in, out) × r", *header, "one thread: ms", "÷ AdamW", "÷ fused"]]
    for case in times.cases("targets"):
        two, one = times.of("targets", case), times.of("one-thread", case)
        of = {name: result["median_us"] for name, result in two.items()}
        alone = {name: result["median_us"] for name, result in one.items()}
        peer = [p["median_us"] for p in peers if p["case"] == case and p["contender"] == peer_name]
        rows.append(
            [
                words(case),
                *(milliseconds(of[name]) for name in ("rite", "adamw", "fused_adamw")),
                f"{of['rite'] / of['adamw']:.2f}",
                f"{of['rite'] / of['fused_adamw']:.1f}",
                milliseconds(statistics.mean(peer)) if peer else "",
                f"{statistics.mean(peer) / of['rite']:.0f}" if peer else "",
                milliseconds(alone["rite"]),
                f"{alone['rite'] / alone['adamw']:.2f}",
                f"{alone['rite'] / alone['fused_adamw']:.1f}",
            ]
        )
    return markdown(filled(rows))


def beside_earlier(results: list[dict]) -> str:
    """The time of this revision ÷ that of an earlier one, both in one program (scripts/bench --before)."""
    times = Times(results)
    rows = [["pairs × (in, out) × r", "two threads", "one"]]
    for case in times.cases("targets"):
        runs = [times.of(suite, case) for suite in ("targets", "one-thread")]
        ratios = [run["rite"]["median_us"] / run["rite, before"]["median_us"] for run in runs]
        rows.append([words(case), *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown(rows)


def in_python(times: Times, suite: str, peers: list[dict]) -> str:
    """The Python package beside what Python users have; empty where it was not installed."""
    rows = [
        [
            "pairs × (in, out) × r",
            "lora_rite.LoraRite ms",
            "÷ the step in C++",
            "AdamW ms",
            "AdamW(foreach) ms",
            "AdamW(fused) ms",
            "pytorch_optimizer.LoRARite ms",
            "times faster",
        ]
    ]
    for case in times.cases(suite):
        here = [p for p in peers if p["case"] == case]
        if not any(p["contender"] == "lora_rite.LoraRite" for p in here):
            return ""

        def of(name, here=here):
            return statistics.mean(p["median_us"] for p in here if p["contender"] == name)

        ours, peer = of("lora_rite.LoraRite"), of("pytorch_optimizer.LoRARite")
        rows.append(
            [
                words(case),
                milliseconds(ours),
                f"{ours / times.of(suite, case)['rite']['median_us']:.2f}",
                *(milliseconds(of("torch.optim.AdamW" + how)) for how in ("", "(foreach)", "(fused)")),
                milliseconds(peer),
                f"{peer / ours:.0f}",
            ]
        )
    return markdown(rows)


def scaling(times: Times, suite: str, variable: str, index: int) -> str:
    """Cases that differ in one number of their shape, the one at `index`."""
    rows = [[variable, "LoRA-RITE ms", "ns an element", "AdamW ms", "ns an element"]]
    for case in times.cases(suite):
        run = times.of(suite, case)
        row = [f"{shape_of(case)[index]:,}"]
        for result in (run["rite"], run["adamw"]):
            row += [milliseconds(result["median_us"]), f"{1e3 * result['median_us'] / result['parameters']:.1f}"]
        rows.append(row)
    return markdown(rows)


def variants(times: Times) -> str:
    rows = [["variant", "ms", "÷ AdamW of the same dtype"]]
    for case in times.cases("variants"):
        run = times.of("variants", case)
        for name, result in run.items():
            if name in ("adam", "adamw"):
                continue
            label = name.replace("rite", "LoRA-RITE") + ("" if case == "variants" else f", {result['dtype']}")
            rows.append(
                [label, milliseconds(result["median_us"]), f"{result['median_us'] / run['adamw']['median_us']:.2f}"]
            )
    return markdown(rows)


def optimizers(times: Times) -> str:
    rows = [["optimizer", "ms", "÷ AdamW", "operator calls"]]
    run = times.of("optimizers", "optimizers")
    for name, result in sorted(run.items(), key=lambda item: item[1]["median_us"]):
        rows.append(
            [
                name,
                milliseconds(result["median_us"]),
                f"{result['median_us'] / run['adamw']['median_us']:.2f}",
                str(result["operator_calls"]),
            ]
        )
    return markdown(rows)


def memory(results: list[dict]) -> str:
    rows = [
        [
            "pairs × (in, out) × r",
            "factors MB",
            "LoRA-RITE's state MB",
            "AdamW's MB",
            "ratio",
            "peak of a step MB",
            "AdamW's MB",
        ]
    ]
    for case in dict.fromkeys(r["case"] for r in results):
        run = {r["contender"]: r for r in results if r["case"] == case}
        rite, adamw = run["rite"], run["adamw"]
        mb = lambda value: f"{value / 1e6:.1f}"
        rows.append(
            [
                words(case),
                mb(rite["factor_bytes"]),
                mb(rite["state_bytes"]),
                mb(adamw["state_bytes"]),
                f"{rite['state_bytes'] / adamw['state_bytes']:.2f}",
                mb(rite["peak_bytes"]),
                mb(adamw["peak_bytes"]),
            ]
        )
    return markdown(rows)


def memory_of_others(results: list[dict]) -> str:
    others = [name for name in dict.fromkeys(r["contender"] for r in results) if name not in ("rite", "adamw")]
    if not others:
        return ""
    rows = [["pairs × (in, out) × r", *others]]
    for case in dict.fromkeys(r["case"] for r in results):
        run = {r["contender"]: r for r in results if r["case"] == case}
        cells = []
        for name in others:
            state, peak = (run[name][which] / run[name]["factor_bytes"] for which in ("state_bytes", "peak_bytes"))
            cells.append(f"{state:.2f}, {peak:.2f}")
        rows.append([words(case), *cells])
    return "Of others that step pairs, ÷ the factors' bytes: the state, and the peak of a step.\n\n" + markdown(rows)


def roofline(results: list[dict]) -> str:
    """A row a rank, a column for each pass over a factor: its time ÷ what the machine allows."""
    passes = list(dict.fromkeys((r["threads"], r["pass"], r["factor"]) for r in results))
    rows = [["rank", *(f"{act} of {factor}, {threads}" for threads, act, factor in passes)]]
    for rank in dict.fromkeys(r["rank"] for r in results):
        times = {
            (r["threads"], r["pass"], r["factor"]): r["nanoseconds"] / max(r["memory_limit"], r["arithmetic_limit"])
            for r in results
            if r["rank"] == rank
        }
        rows.append([str(rank), *(f"{times[each]:.1f}" for each in passes)])
    return markdown(rows)


def between(values: list[float], form: str) -> str:
    """The least and the greatest value, or the one that both are."""
    ends = [format(value, form) for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def summary(times: Times, peers: list[dict], memory: list[dict]) -> str:
    """What all the tables say, in five sentences at most, one a line."""
    runs = {case: times.of("targets", case) for case in times.cases("targets")}
    to = lambda contender, case: runs[case]["rite"]["median_us"] / runs[case][contender]["median_us"]
    by_rank: dict[int, list[float]] = {}
    for case in runs:
        by_rank.setdefault(shape_of(case)[3], []).append(to("adamw", case))
    ranks = ", ".join(f"{between(by_rank[rank], '.2f')} at rank {rank}" for rank in sorted(by_rank))
    sentences = [
        f"A step of LoRA-RITE ÷ one of `torch::optim::AdamW`, two threads: {ranks}.",
        f"It takes {between([to('fused_adamw', case) for case in runs], '.1f')} times as long as one of ATen's "
        "fused AdamW.",
    ]
    ours = {case: run["rite"]["median_us"] for case, run in runs.items()}
    slower = [
        statistics.mean(found) / ours[case]
        for case in runs
        if (found := [p["median_us"] for p in peers if p["case"] == case and p["contender"].endswith("LoRARite")])
    ]
    if slower:
        sentences.append(f"`pytorch_optimizer.LoRARite` takes {between(slower, '.0f')} times as long as LoRA-RITE.")
    many = [(shape_of(case)[0], times.of("pairs", case)) for case in times.cases("pairs")]
    if many:
        calls = between([run["rite"]["operator_calls"] for _, run in many], ".0f")
        of_adamw = between([run["adamw"]["operator_calls"] / pairs for pairs, run in many], ".0f")
        sentences.append(
            f"A step makes {calls} operator calls for {many[0][0]:,} to {many[-1][0]:,} pairs of one shape; "
            f"AdamW makes {of_adamw} for each pair."
        )
    states = {(r["case"], r["contender"]): r["state_bytes"] for r in memory}
    shares = [states[case, "rite"] / states[case, "adamw"] for case, name in states if name == "rite"]
    if shares:
        sentences.append(f"LoRA-RITE's state takes {between(shares, '.2f')} of the memory of AdamW's.")
    return "\n".join(sentences)


def folded(title: str, *parts: str) -> str:
    """A section that a reader opens; its heading stays one, for links."""
    return "\n\n".join(["<details>", f"<summary>{title}</summary>", f"## {title}", *filter(None, parts), "</details>"])


def compile_time(results: list[dict]) -> str:
    rows = [["translation unit", "CPU seconds", "÷ AdamW's"]]
    for r in results:
        rows.append([r["contender"], f"{r['seconds']:.1f}", f"{r['ratio']:.2f}"])
    return markdown(rows)


def plain_axes(axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK)


def draw_targets(times: Times, path: str) -> None:
    cases = times.cases("targets")[::-1]
    figure, axes = plt.subplots(figsize=(7.5, 0.45 * len(cases) + 1))
    for y, case in enumerate(cases):
        run = times.of("targets", case)
        ratio = run["rite"]["median_us"] / run["adamw"]["median_us"]
        axes.barh(y, ratio, height=0.6, color=RITE)
        axes.plot([run["rite"]["target"]] * 2, [y - 0.4, y + 0.4], color=INK, linewidth=2)
        axes.text(ratio + 0.05, y, f"{ratio:.2f}", va="center", color=INK)
    axes.axvline(1, color=ADAMW, linewidth=1)
    axes.set_yticks(range(len(cases)), [words(case) for case in cases])
    axes.set_xlabel("LoRA-RITE's step ÷ torch::optim::AdamW's (bar: target)", color=INK)
    plain_axes(axes)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_scaling(times: Times, path: str) -> None:
    panels = [
        ("pairs", 0, "pairs of 256 × 256, r = 8"),
        ("width", 1, "in = out, 8 pairs, r = 16"),
        ("ranks", 3, "rank, 32 pairs of 1024 × 1024"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for panel, (suite, index, title) in zip(axes, panels):
        cases = times.cases(suite)
        for contender in ("adamw", "fused_adamw", "rite"):
            runs = [times.of(suite, case).get(contender) for case in cases]
            panel.plot(
                [shape_of(case)[index] for case in cases],
                [1e3 * run["median_us"] / run["parameters"] for run in runs],
                color=COLORS[contender],
                marker="o",
                markersize=4,
                label=LABELS[contender],
            )
        panel.set_xscale("log", base=2 if suite != "pairs" else 10)
        panel.set_yscale("log")
        panel.set_xlabel(title, color=INK)
        plain_axes(panel)
    axes[0].set_ylabel("ns an element of the factors", color=INK)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    times = Times(load(folder, "step_time.json"))
    peers = load(folder, "peers-before.json") + load(folder, "peers-after.json")
    draw_targets(times, os.path.join(folder, "targets.png"))
    draw_scaling(times, os.path.join(folder, "scaling.png"))
    of_memory = load(folder, "memory.json")
    text = [
        "# Benchmarks",
        summary(times, peers, of_memory),
        f"Written by `scripts/bench` on {date.today().isoformat()}: {machine()}, medians of interleaved rounds in one "
        "process; `-O2` without `-march`. Peers in Python ran before and after, means of both.",
        "![Ratios to AdamW](targets.png)",
        "![Time of an element](scaling.png)",
        folded("A step", "Two threads, and one in the last columns.", targets(times, peers)),
    ]
    python = in_python(times, "targets", peers)
    if python:
        text.append(folded("In Python, two threads", python))
    for path in sorted(glob.glob(os.path.join(folder, "before-*.json"))):
        revision = os.path.basename(path)[len("before-") : -len(".json")]
        text.append(
            folded(f"A step ÷ one of revision {revision}", beside_earlier(load(folder, os.path.basename(path))))
        )
    text += [
        folded("Ranks", "32 pairs of 1024 × 1024.", scaling(times, "ranks", "rank", 3)),
        folded("Number of pairs", "256 × 256, r = 8.", scaling(times, "pairs", "pairs", 0)),
        folded("Width", "8 pairs, in = out, r = 16.", scaling(times, "width", "in = out", 1)),
        folded("Variants, 24 × (1024, 1024) × 16", variants(times)),
        folded(
            "Other optimizers, 24 × (1024, 1024) × 16",
            "By their names in `make_optimizer`, with their own defaults.",
            optimizers(times),
        ),
        folded("Memory", memory(of_memory), memory_of_others(of_memory)),
        folded(
            "How far from the machine's limits",
            "The time of a pass over a factor with one and two threads ÷ what the machine allows: the bytes at the "
            "measured bandwidth, or the operations at the rate of the library's own double matrix product, whichever "
            "takes longer. Less than 1 comes from sums in float.",
            roofline(load(folder, "roofline.json")),
        ),
        folded(
            "Compile time",
            "A translation unit, `-O2`, medians of rounds of all.",
            compile_time(load(folder, "compile_time.json")),
        ),
    ]
    with open(os.path.join(folder, "report.md"), "w", encoding="utf-8") as file:
        file.write("\n\n".join(part for part in text if part) + "\n")


if __name__ == "__main__":
    main()
