#!/usr/bin/env python3
"""The Python package as a user gets it: a wheel is built and installed into a fresh environment; python/tests run there.

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
import sysconfig

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

sys.dont_write_bytecode = True
sys.path.insert(0, str(REPOSITORY / "tests/support"))

import python_packages  # noqa: E402

python = REPOSITORY / ".deps/interop/bin/python"
python_packages.need(
    ["torch", "setuptools", "peft", "transformers"],
    str(python) if python.exists() else None,
    "scripts/setup --tests makes an environment that has them",
)


def environment_with(folder: pathlib.Path, paths: list[str]) -> str:
    """A fresh virtual environment that sees the packages in these folders, too; its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    program = str(folder / "bin/python")
    (site_of(program) / "shared.pth").write_text("\n".join(paths), encoding="utf-8")
    return program


def site_of(program: str) -> pathlib.Path:
    found = subprocess.run(
        [program, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return pathlib.Path(found.stdout.strip())


def check_refuses(program: str, sentence: str, **environment: str) -> None:
    """setup.py ends at once with one sentence."""
    result = subprocess.run(
        [program, "setup.py", "--version"], cwd=REPOSITORY / "python", env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    lines = result.stderr.strip().splitlines()
    assert result.returncode != 0, f"setup.py succeeded, expected: {sentence}"
    assert len(lines) == 1 and lines[0].startswith("lora_rite: ") and sentence in lines[0], result.stderr


def main(exchange: str, work: pathlib.Path) -> int:
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        print(f"Python's headers are not in {include} (Debian: python3-dev)")
        return 77
    work.mkdir(parents=True, exist_ok=True)
    packages = [path for path in sys.path if path.endswith("-packages")]
    program = environment_with(work / "environment", packages)

    check_refuses(program, "no C++ compiler was found (no-such-compiler)", CXX="no-such-compiler")
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

    pip = [sys.executable, "-m", "pip", "--python", program, "--disable-pip-version-check", "--no-input"]
    launcher = {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache"} if shutil.which("ccache") else {}
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(work), str(REPOSITORY / "python")]
    for wheel in work.glob("*.whl"):
        wheel.unlink()
    subprocess.run(build, check=True, env={**os.environ, **launcher})
    (wheel,) = work.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)

    environment = {**os.environ, "LORA_RITE_EXCHANGE": exchange, "PYTHONDONTWRITEBYTECODE": "1"}
    tests = REPOSITORY / "python/tests"
    return subprocess.run([program, "-m", "unittest", "discover", "-s", tests], cwd=work, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1]), pathlib.Path(sys.argv[2]).resolve()))
