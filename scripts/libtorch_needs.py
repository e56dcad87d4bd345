"""Prints, one a line, what pip must install beside a torch wheel so that its libtorch_cpu.so loads.

    python3 scripts/libtorch_needs.py FOLDER   FOLDER has torch/ and torch-*.dist-info/, as site-packages do

PyPI's wheel for Linux x86-64 is a CUDA build, whose requirements are some GB. C++ that runs on a CPU links
libtorch_cpu.so and libc10.so alone, and of the requirements those need two small ones, libcudart and libcupti. A build
without CUDA needs nothing. What is missing is asked of ldd, the versions of the wheel's own list of requirements.
"""

import pathlib
import re
import subprocess
import sys

# What a library is called in a requirement: an extra of cuda-toolkit, or before that the end of a wheel's name.
OLD_NAMES = {"cudart": "cuda-runtime", "cupti": "cuda-cupti", "nvrtc": "cuda-nvrtc"}


def requirement_of(library: str, requirements: list[str]) -> str:
    """The part of the requirements that brings a library, without its environment markers."""
    name = re.sub(r"^lib|\.so.*$", "", library).lower()
    for requirement in requirements:
        requirement = re.sub(r"[() ]", "", requirement.split(";")[0])  # "name (==1.2)" in wheels of 2.6
        toolkit = re.fullmatch(r"cuda-toolkit\[([\w,-]+)\](.*)", requirement)
        if toolkit and name in toolkit[1].split(","):
            return f"cuda-toolkit[{name}]{toolkit[2]}"
        if requirement.startswith(f"nvidia-{OLD_NAMES.get(name, name)}-cu"):
            return requirement
    sys.exit(f"libtorch_needs: libtorch_cpu.so needs {library}, and no requirement of the wheel is known to bring it")


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    listing = subprocess.run(
        ["ldd", folder / "torch/lib/libtorch_cpu.so"], stdout=subprocess.PIPE, text=True, check=True
    )
    missing = re.findall(r"^\s*(\S+) => not found", listing.stdout, re.MULTILINE)
    metadata = next(folder.glob("torch-*.dist-info")) / "METADATA"
    requirements = re.findall(r"^Requires-Dist: (.*)", metadata.read_text(), re.MULTILINE)
    for requirement in sorted({requirement_of(library, requirements) for library in missing}):
        print(requirement)


main()
