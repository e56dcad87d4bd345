#!/usr/bin/env python3
"""The Python package as a user gets it: a wheel is installed into a fresh environment, where python/tests run.

    python_test.py EXCHANGE WORK_DIRECTORY    # EXCHANGE is exchange.cpp, compiled

Needs a Python with torch and its headers, setuptools, and for the programs in python/tests peft and transformers:
scripts/setup --tests makes an environment with them, .deps/interop. Without it the test is skipped.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

sys.dont_write_bytecode = True
sys.path[:0] = [str(REPOSITORY / "tests/support"), str(REPOSITORY / "scripts")]

import python_headers  # noqa: E402
import python_packages  # noqa: E402
from python_package import environment_with, install_into, packages_here, site_of  # noqa: E402

python = REPOSITORY / ".deps/interop/bin/python"
python_packages.need(
    ["torch", "setuptools", "peft", "transformers"],
    str(python) if python.exists() else None,
    "scripts/setup --tests makes an environment that has them",
)


WITHOUT_HEADERS = """
import runpy, sysconfig
sysconfig.get_path = lambda *_: "/no/such/folder"
runpy.run_path("setup.py", run_name="__main__")
"""


def check_refuses(program: str, sentence: str, code: tuple[str, ...] = ("setup.py",), **environment: str) -> None:
    """setup.py ends at once with one sentence."""
    result = subprocess.run(
        [program, *code, "--version"], cwd=REPOSITORY / "python", env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    lines = result.stderr.strip().splitlines()
    assert result.returncode != 0, f"setup.py succeeded, expected: {sentence}"
    assert len(lines) == 1 and lines[0].startswith("lora_rite: ") and sentence in lines[0], result.stderr


def main(exchange: str, work: pathlib.Path) -> int:
    if missing := python_headers.what_is_missing():
        print(missing)
        return 77
    work.mkdir(parents=True, exist_ok=True)
    program = environment_with(work / "environment", packages_here())

    check_refuses(program, "no C++ compiler was found (no-such-compiler)", CXX="no-such-compiler")
    check_refuses(program, "Python's headers are not in /no/such/folder; install", ("-c", WITHOUT_HEADERS))
    nothing = environment_with(work / "without-torch", [])
    site = site_of(nothing)
    for package in ("setuptools", "_distutils_hack"):
        shutil.copytree(pathlib.Path(importlib.util.find_spec(package).origin).parent, site / package)
    check_refuses(nothing, "no torch was found by")
    (site / "torch").mkdir()
    (site / "torch/__init__.py").touch()
    (site / "torch-2.5.1.dist-info").mkdir()
    (site / "torch-2.5.1.dist-info/METADATA").write_text("Name: torch\nVersion: 2.5.1\n", encoding="utf-8")
    check_refuses(nothing, "torch is 2.5.1, expected 2.6 or later")

    install_into(program, work)
    environment = {**os.environ, "LORA_RITE_EXCHANGE": exchange, "PYTHONDONTWRITEBYTECODE": "1"}
    tests = REPOSITORY / "python/tests"
    return subprocess.run([program, "-m", "unittest", "discover", "-s", tests], cwd=work, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1]), pathlib.Path(sys.argv[2]).resolve()))
