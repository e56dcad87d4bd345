#!/usr/bin/env python3
"""Writes a run's curves as event files for TensorBoard: tensorboard.py METRICS.jsonl FOLDER."""

import glob
import json
import os
import sys
import time


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    metrics, folder = sys.argv[1:]
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        print(f"{sys.executable}: the package 'tensorboardX' is missing ({error})", file=sys.stderr)
        return 1

    with open(metrics, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    steps = [line for line in lines if "step" in line]
    # A run has no clock of its own: it ends now, and its steps took what they took.
    clock = time.time() - sum(line["ms_step"] for line in steps) / 1000
    for old in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
        os.remove(old)  # TensorBoard would show both
    writer = SummaryWriter(folder)
    for line in steps:
        clock += line["ms_step"] / 1000
        line["tokens_per_second"] = 1000 * line["tokens"] / line["ms_step"]
        for name, value in line.items():
            if name == "step":
                continue
            split, _, score = name.partition("_")
            place = f"{split}/{score}" if split in ("validation", "test") else f"train/{name}"
            writer.add_scalar(place, float("nan") if value is None else value, line["step"], walltime=clock)
    final = next((line for line in lines if line.get("final")), None)
    if final:
        numbers = {name: value for name, value in final.items() if isinstance(value, (int, float, str))}
        writer.add_text("summary", "\n".join(f"- {name}: {value}" for name, value in numbers.items()))
        for name, value in final.items():
            is_score = name.startswith("test_") and name != "test_examples"
            if is_score and value is not None and not any(name in line for line in steps):
                writer.add_scalar("test/" + name.removeprefix("test_"), value, len(steps), walltime=clock)
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
