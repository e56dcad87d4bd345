"""Compiles Engine::Cuda's kernels for every architecture that is promised, and looks at what ptxas says of them.

nvcc_test.py ROOT OUT NVCC… # NVCC is a command, a launcher such as ccache in front of it
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ARCHITECTURES = ["80", "90", "120"]

# Of each kernel: the most registers a thread, and the most bytes that are spilled. Two blocks of 256 threads, on whose
# loads and sums a multiprocessor works in turn, have 128 registers each; at rank 64 there is one.
REGISTERS = 128
REGISTERS_AT_64 = 168
SPILLED = 32

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for.*?"
    r"(?P<spill>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
KERNEL = re.compile(r"\d(?P<kernel>[a-z]+_(?:tiles|factors))ILi(?P<rank>\d+)E")


def check(architecture: str, said: str) -> list[str]:
    """What is wrong with one architecture's kernels."""
    faults, kernels = [], 0
    for entry in ENTRY.finditer(said):
        kernel = KERNEL.search(entry["name"])
        if not kernel:
            return [f"sm_{architecture}: no kernel of this test's: {entry['name']}"]
        kernels += 1
        what = f"sm_{architecture}, {kernel['kernel']} at rank {kernel['rank']}"
        registers, spill = int(entry["registers"]), int(entry["spill"])
        print(f"{what}: {registers} registers, {spill} bytes spilled")
        most = REGISTERS_AT_64 if kernel["rank"] == "64" else REGISTERS
        if registers > most:
            faults.append(f"{what}: {registers} registers, expected at most {most}")
        if spill > SPILLED:
            faults.append(f"{what}: {spill} bytes spilled, expected at most {SPILLED}")
    # Five classes of ranks; one kernel of the five is compiled for two bases.
    if kernels != 30:
        faults.append(f"sm_{architecture}: {kernels} kernels, expected 30")
    return faults


def main() -> int:
    root, out, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if command[-1].endswith("NOTFOUND"):
        print("nvcc is missing: Engine::Cuda's kernels are not compiled here")
        return 77
    out.mkdir(parents=True, exist_ok=True)
    faults = []
    for architecture in ARCHITECTURES:
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DLORA_RITE_DEVICE_RULE", f"-arch=sm_{architecture}"]
        flags += ["-Xptxas", "-v", f"-I{root / 'include'}"]
        if os.environ["LORA_RITE_WARNINGS_AS_ERRORS"] == "1":
            flags += ["-Werror", "all-warnings"]
        run = subprocess.run(
            [*command, *flags, "-c", str(root / "src/cuda/kernels.cu"), "-o", str(out / f"kernels-{architecture}.o")],
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            print(run.stdout + run.stderr)
            return 1
        faults += check(architecture, run.stdout + run.stderr)
    for fault in faults:
        print(f"nvcc_test: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
