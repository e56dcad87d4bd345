#!/usr/bin/env python3
"""Builds the Python package, and installs it into a virtual environment made for it.

    python_package.py FOLDER    # FOLDER/bin/python has it, and the packages of the interpreter that runs this

That interpreter needs torch, setuptools and pip, and its headers; nothing is fetched.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import python_headers

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def packages_here() -> "list[str]":
    """The folders that this interpreter has its packages from."""
    return [path for path in sys.path if path.endswith("-packages")]


def site_of(program: str) -> pathlib.Path:
    """The folder that an interpreter has its own packages in."""
    found = subprocess.run(
        [program, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    return pathlib.Path(found.stdout.strip())


def environment_with(folder: pathlib.Path, paths: "list[str]") -> str:
    """A fresh virtual environment that sees the packages in these folders, too; its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    program = str(folder / "bin/python")
    (site_of(program) / "shared.pth").write_text("\n".join(paths), encoding="utf-8")
    return program


def install_into(program: str, work: pathlib.Path) -> None:
    """Builds a wheel in the folder `work`, and installs it for an interpreter."""
    for wheel in work.glob("lora_rite-*.whl"):
        wheel.unlink()
    launcher = {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache"} if shutil.which("ccache") else {}
    build = [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(work), str(REPOSITORY / "python")]
    subprocess.run(build, check=True, env={**os.environ, **launcher})
    (wheel,) = work.glob("lora_rite-*.whl")
    subprocess.run([*PIP, "--python", program, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)


def main() -> None:
    """As the module's docstring says."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if missing := python_headers.what_is_missing():
        sys.exit(missing)
    folder = pathlib.Path(sys.argv[1]).resolve()
    install_into(environment_with(folder, packages_here()), folder)


if __name__ == "__main__":
    main()
