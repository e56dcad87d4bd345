#!/usr/bin/env python3
"""What a translation unit with the optimizer costs to compile, beside the same one with torch::optim::AdamW.

    compile_time.py --json compile_time.json -- g++ -std=c++17 -O2 -I include … -c

CPU seconds of the compiler, in rounds of all units: compare the ratios, which are medians over the rounds.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess

UNITS = pathlib.Path(__file__).resolve().parent / "compile_time"
CONTENDERS = {
    "torch::optim::AdamW": ["adamw.cpp"],
    "LoraRite<>, header-only": ["lora_rite.cpp"],
    "LoraRite<>, lora_rite::compiled": ["lora_rite.cpp", "-DLORA_RITE_COMPILED"],
    "the header, and an optimizer handed on": ["include.cpp"],
}


def seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env={**os.environ, "CCACHE_DISABLE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", required=True)
    parser.add_argument("compiler", nargs="+", help="the command, to which a source and -o are appended")
    options = parser.parse_args()

    times = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, (source, *flags) in CONTENDERS.items():
            times[name].append(seconds([*options.compiler, *flags, str(UNITS / source), "-o", os.devnull]))
    reference = times["torch::optim::AdamW"]
    results = [
        {
            "contender": name,
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, reference)),
        }
        for name, own in times.items()
    ]
    with open(options.json, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    for result in results:
        print(f"{result['contender']:42} {result['seconds']:5.1f} s  {result['ratio']:.2f}")


if __name__ == "__main__":
    main()
