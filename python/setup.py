"""Builds the native module by CMake, against the torch of the environment that pip installs into.

Setuptools and not scikit-build-core, because what the build needs is looked for before CMake begins, so that what is
missing is told in one sentence. LORA_RITE_CMAKE_ARGS are further arguments for CMake.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).resolve().parent
OLDEST = (2, 6)

# What a pip that isolates builds hides from its children is what they are to find.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
FIND_TORCH = """
import importlib.metadata, importlib.util, os
spec = importlib.util.find_spec("torch")
if spec and spec.submodule_search_locations:
    print(os.path.join(spec.submodule_search_locations[0], "share", "cmake", "Torch"))
    print(importlib.metadata.version("torch"))
"""


def refuse(sentence: str) -> None:
    """Ends the build with one sentence."""
    raise SystemExit(f"lora_rite: {sentence}")


def library_version() -> str:
    """The version of the C++ library, which stands in version.hpp alone."""
    header = HERE.parent / "include/lora_rite/version.hpp"
    if not header.exists():
        refuse("the C++ library is not there; install from a clone of the repository: pip install ./python")
    return ".".join(re.findall(r"#define LORA_RITE_VERSION_\w+ (\d+)", header.read_text(encoding="utf-8")))


def torch_here() -> "tuple[str, tuple[int, int]]":
    """The folder of torch's CMake files, and its version."""
    command = [sys.executable, "-c", FIND_TORCH]
    found = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=HERE.parent).stdout.split()
    if len(found) != 2:
        refuse(
            f"no torch was found by {sys.executable}; install torch {OLDEST[0]}.{OLDEST[1]} or later first (a tool "
            "that builds in an environment of its own, as uv and build do, needs --no-build-isolation)"
        )
    version = tuple(int(number) for number in found[1].split("+")[0].split(".")[:2])
    if version < OLDEST:
        refuse(f"torch is {found[1]}, expected {OLDEST[0]}.{OLDEST[1]} or later")
    if not os.path.exists(os.path.join(found[0], "TorchConfig.cmake")):
        refuse(f"torch {found[1]} has no CMake files in {found[0]}, expected a torch as its wheels bring it")
    return found[0], version


def tool(name: str) -> "str | None":
    """A program on the path, or one that pip has put beside the interpreter."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def check_compiler() -> None:
    """A C++ compiler and Python's headers."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]
    if not shutil.which(compiler[0]):
        refuse(f"no C++ compiler was found ({compiler[0]}); install g++ 12 or clang 14 or later, or name one in CXX")
    sys.path.insert(0, str(HERE.parent / "scripts"))
    import python_headers

    if missing := python_headers.what_is_missing():
        refuse(missing)


class BuildByCMake(build_ext):
    """Setuptools' build_ext, with CMake for the compiler."""

    def build_extension(self, extension: Extension) -> None:
        """Configures and builds into the place where setuptools looks for the module."""
        target = pathlib.Path(self.get_ext_fullpath(extension.name)).resolve()
        work = pathlib.Path(self.build_temp).resolve()
        shutil.rmtree(work, ignore_errors=True)  # which may be of another torch
        cmake = tool("cmake") or refuse("no cmake was found; install it (pip install cmake)")
        configure = [
            cmake,
            "-S",
            str(HERE),
            "-B",
            str(work),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTorch_DIR={TORCH}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *(["-G", "Ninja"] if tool("ninja") else []),
            *shlex.split(os.environ.get("LORA_RITE_CMAKE_ARGS", "")),
        ]
        build = [cmake, "--build", str(work), "--target", "_native", "--parallel", str(os.cpu_count() or 1)]
        for command in (configure, build):
            if subprocess.run(command, env=ENVIRONMENT).returncode:
                refuse(f"the build failed (above): {shlex.join(command)}")


VERSION = library_version()
TORCH, TORCH_VERSION = torch_here()
check_compiler()
setup(
    version=VERSION,
    # The module fits the torch that it was built against: LibTorch promises no binary interface beyond that.
    install_requires=["torch=={}.{}.*".format(*TORCH_VERSION)],
    setup_requires=[
        *([] if tool("cmake") else ["cmake>=3.22"]),
        *([] if tool("ninja") or tool("make") else ["ninja"]),
    ],
    ext_modules=[Extension("lora_rite._native", sources=[])],
    cmdclass={"build_ext": BuildByCMake},
)
