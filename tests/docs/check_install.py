"""The installation, pasted: the README's CMake block builds its program, docs/install.md's CMakeLists.txt does so with
nlohmann-json, and the README's line for find_package installs.

    check_install.py REPOSITORY WORK_DIRECTORY GENERATOR TORCH_CONFIG_DIRECTORY

The blocks name an address and a tag, which are not asked: FETCHCONTENT_SOURCE_DIR_LORA_RITE gives this checkout.
The line is run by bash in a copy of what an installation needs.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

INSTALLED = ("CMakeLists.txt", "LICENSE", "cmake", "include", "src")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def only(found: list[str], what: str, where: str = "README.md") -> str:
    if len(found) != 1:
        sys.exit(f"{where} has {len(found)} times {what}, expected once")
    return found[0]


def main() -> None:
    root, work = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    generator, torch = sys.argv[3:]
    text = (root / "README.md").read_text(encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)

    def run(*command: str, **options) -> str:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        print(result.stdout)
        if result.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit status {result.returncode}")
        return result.stdout

    # The block, in a project of a stranger, with the README's program.
    app = work / "app"
    app.mkdir(parents=True)
    block = only([code for code in blocks(text, "cmake") if "FetchContent" in code], "a block with FetchContent")
    program = only([code for code in blocks(text, "cpp") if "int main" in code], "a whole program")
    (app / "main.cpp").write_text(program, encoding="utf-8")
    (app / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.22)\nproject(app LANGUAGES CXX)\nadd_executable(app main.cpp)\n{block}",
        encoding="utf-8",
    )
    settings = [f"-DFETCHCONTENT_SOURCE_DIR_LORA_RITE={root}", f"-DTorch_DIR={torch}"]
    run("cmake", "-G", generator, "-S", str(app), "-B", str(app / "build"), *settings)
    run("cmake", "--build", str(app / "build"))
    shown = only([code for code in blocks(text, "text") if code.startswith("step 100")], "the program's output")
    printed = run(str(app / "build/app"))
    for expected, found in zip(shown.splitlines(), printed.splitlines(), strict=True):
        same_step = expected.split("  loss ")[0] == found.split("  loss ")[0]
        losses = [float(line.split("  loss ")[1]) for line in (expected, found)]
        # Another processor rounds otherwise, and 400 steps carry that far; a changed method shows at once.
        if not same_step or not 0.5 < losses[0] / losses[1] < 2:
            sys.exit(f"README.md says '{expected}', the program '{found}'")

    # The whole CMakeLists.txt, with a header that wants nlohmann-json and the lines that are for it.
    whole = work / "whole"
    whole.mkdir()
    page = (root / "docs/install.md").read_text(encoding="utf-8")
    file = only([code for code in blocks(page, "cmake") if "project(" in code], "a CMakeLists.txt", "docs/install.md")
    with_json = re.sub(r"^# (?=(find_package|target_link_libraries)\()", "", file, flags=re.MULTILINE)
    if with_json == file:
        sys.exit("docs/install.md: its CMakeLists.txt has no commented lines for nlohmann-json")
    (whole / "CMakeLists.txt").write_text(with_json, encoding="utf-8")
    (whole / "main.cpp").write_text(
        "#include <lora_rite/io/peft.hpp>\nint main() { return lora_rite::Adapter().tensors.empty() ? 0 : 1; }\n",
        encoding="utf-8",
    )
    run("cmake", "-G", generator, "-S", str(whole), "-B", str(whole / "build"), *settings)
    run("cmake", "--build", str(whole / "build"))
    run(str(whole / "build/app"))

    # The line, which bash expands.
    copy = work / "copy"
    copy.mkdir()
    for name in INSTALLED:
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, copy / name)
    line = only(re.findall(r"`(cmake -B build [^`]*--install[^`]*)`", text), "a line that installs")
    if "PREFIX" not in line:
        sys.exit("README.md: the line that installs does not say PREFIX")
    environment = {"Torch_DIR": torch, "CMAKE_GENERATOR": generator}
    run("bash", "-ec", line.replace("PREFIX", str(work / "prefix")), cwd=copy, env={**os.environ, **environment})
    if not (work / "prefix/include/lora_rite/lora_rite.hpp").exists():
        sys.exit(f"'{line}' installed no lora_rite/lora_rite.hpp")


if __name__ == "__main__":
    main()
