#!/usr/bin/env python3
"""Do the tests notice when the algorithm is wrong? Applies small mutations to the headers and runs the tests on each.

    mutate.py --build FOLDER             all mutations of mutations.py
    mutate.py --build FOLDER NAME…       those of which the number is NAME, or the file or the text holds it:
                                         17, pairs.hpp, bump_version
    mutate.py --build FOLDER --survivors those that no test has noticed in the last run, or that have not run yet
    mutate.py --build FOLDER --list      what there is, and what became of it in the last run; runs nothing

All mutants are compiled into one binary, each behind a switch that an environment variable turns ("mutant schemata",
Untch, Offutt & Harrold 1993): building takes as long as building the tests once. A mutant is killed when a test fails,
the process dies, or it hangs. Ends with 1 if a mutant survives that is not explained in mutations.py, or one that is
explained was killed. FOLDER/results.tsv is written as it goes and keeps what is not run again.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from mutations import MUTATIONS

ROOT = pathlib.Path(__file__).resolve().parents[2]
SWITCH = "LORA_RITE_MUTANT"
HEADER = f"""#pragma once
#ifdef __cplusplus
#include <cstdlib>
inline const int lora_rite_mutant = std::getenv("{SWITCH}") ? std::atoi(std::getenv("{SWITCH}")) : 0;
#endif
"""
# What takes long and notices nothing that others miss. Soak and Property do run, but last and on survivors only.
SLOW = "-Soak*:*/Soak*:Property*:HostKernels.*Speed*"


# The kernels of Engine::Cuda have a program of their own; all others are tested by the first.
PROGRAMS = ["lora_rite_tests", "lora_rite_cuda_engine_tests"]


def program_of(number: int) -> str:
    """Which tests are to notice a mutation."""
    return PROGRAMS[MUTATIONS[number - 1][0].startswith("engine/cuda/")]


def mutated(text: str, numbered: list[tuple[int, str, str]], file: str) -> str:
    """`text` with every mutation of the file behind its switch. Parts may be the same in several mutations."""
    parts: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for number, snippet, replacement in numbered:
        before, part, after = re.fullmatch(r"(.*)«(.*)»(.*)", snippet, re.DOTALL).groups()
        whole = before + part + after
        if text.count(whole) != 1:
            sys.exit(
                f"mutation {number}: {text.count(whole)} places in {file} read '{whole}', expected one; "
                "the header has changed: mend tests/mutation/mutations.py"
            )
        begin = text.index(whole) + len(before)
        parts.setdefault((begin, begin + len(part)), []).append((number, replacement))
    for (begin, end), choices in sorted(parts.items(), reverse=True):
        part = text[begin:end]
        for number, replacement in choices:
            condition = f"lora_rite_mutant == {number}"
            if part.endswith(";") or part.endswith("}"):
                part = f"if ({condition}) {{ {replacement} }} else {{ {part} }}"
            else:
                part = f"({condition} ? ({replacement}) : ({part}))"
        text = text[:begin] + part + text[end:]
    return text


def mutated_headers() -> dict[str, str]:
    """By file; ends the program if a mutation has lost its place."""
    headers = {}
    for file in dict.fromkeys(file for file, *_ in MUTATIONS):
        numbered = [
            (number, snippet, replacement)
            for number, (name, snippet, replacement, _) in enumerate(MUTATIONS, 1)
            if name == file
        ]
        headers[file] = mutated((ROOT / "include/lora_rite" / file).read_text(encoding="utf-8"), numbered, file)
    return headers


def write_sources(folder: pathlib.Path) -> None:
    """A copy of what git tracks, with mutated headers."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.rstrip("\0").split("\0"):
        if not (ROOT / name).is_file():
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            shutil.copyfile(ROOT / name, target)
    for file, text in mutated_headers().items():
        (folder / "include/lora_rite" / file).write_text(text, encoding="utf-8")
    (folder / "mutant.hpp").write_text(HEADER, encoding="utf-8")


def build(folder: pathlib.Path, programs: list[str]) -> pathlib.Path:
    """Returns the folder of the programs."""
    source, binary = folder / "source", folder / "build"
    write_sources(source)
    # mutant.hpp comes by its name, since a precompiled header wants the same flags everywhere.
    flags = f"-O1 -include '{source / 'mutant.hpp'}' -Wno-unused -Wno-parentheses"
    for command in (
        [
            "cmake",
            "-S",
            source,
            "-B",
            binary,
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=None",
            f"-DCMAKE_CXX_FLAGS={flags}",
            "-DLORA_RITE_BUILD_COMPILED=ON",
        ],
        ["cmake", "--build", binary, "--target", *programs],
    ):
        with open(folder / "log", "a", encoding="utf-8") as log:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode != 0:
                sys.exit(f"the mutants do not build: see {folder / 'log'}")
    return binary / "tests"


def run(binary: pathlib.Path, mutant: int, timeout: float, test_filter: str) -> tuple[bool, str]:
    """Is it killed, and by which test?"""
    environment = {**os.environ, SWITCH: str(mutant), "OMP_NUM_THREADS": "1"}
    try:
        result = subprocess.run(
            [binary, "--gtest_fail_fast", "--gtest_brief=1", f"--gtest_filter={test_filter}"],
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return True, "hangs"
    failed = re.findall(r"^\[  FAILED  \] (\S+?)(?:,| \(|$)", result.stdout, re.MULTILINE)
    return result.returncode != 0, failed[0] if failed else f"ended with {result.returncode}"


def key(mutation: tuple[str, str, str, str]) -> tuple[str, str, str]:
    """What a mutation is known by in results.tsv: its number changes with the list."""
    file, snippet, replacement, _ = mutation
    return file, snippet.replace("\n", "\\n"), replacement


class Results:
    """What became of each mutation, in a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.verdicts: dict[tuple[str, str, str], str] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                *place, verdict = line.split("\t")
                self.verdicts[tuple(place)] = verdict

    def verdict(self, mutation: tuple[str, str, str, str]) -> str:
        return self.verdicts.get(key(mutation), "not run")

    def note(self, mutation: tuple[str, str, str, str], verdict: str) -> None:
        self.verdicts[key(mutation)] = verdict
        lines = ["\t".join((*key(each), self.verdict(each))) for each in MUTATIONS if key(each) in self.verdicts]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def chosen(names: list[str], only_survivors: bool, results: Results) -> list[int]:
    """The numbers of the mutations that are meant."""

    def is_meant(number: int, mutation: tuple[str, str, str, str], name: str) -> bool:
        return number == int(name) if name.isdigit() else any(name in text for text in mutation[:3])

    for name in names:
        if not any(is_meant(number, mutation, name) for number, mutation in enumerate(MUTATIONS, 1)):
            sys.exit(
                f"no mutation is '{name}': expected a number from 1 to {len(MUTATIONS)}, or a part of a file's name "
                "or of a mutation's text"
            )
    return [
        number
        for number, mutation in enumerate(MUTATIONS, 1)
        if (not names or any(is_meant(number, mutation, name) for name in names))
        and not (only_survivors and results.verdict(mutation).startswith("killed"))
    ]


def describe(number: int) -> str:
    file, snippet, replacement, _ = MUTATIONS[number - 1]
    part = re.search("«(.*)»", snippet, re.DOTALL).group(1)
    return f"{number:3} {file}: {part} → {replacement}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True, help="folder for the mutants")
    parser.add_argument("names", nargs="*", metavar="NAME", help="numbers, or parts of a file's name or of the text")
    parser.add_argument("--survivors", action="store_true", help="only those that were not killed in the last run")
    parser.add_argument("--list", action="store_true", help="show them, and run nothing")
    options = parser.parse_args()
    folder = options.build.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.tsv")
    numbers = chosen(options.names, options.survivors, results)
    if options.list or not numbers:
        mutated_headers()
        for number in numbers:
            print(f"{describe(number)}: {results.verdict(MUTATIONS[number - 1])}")
        print(f"{len(numbers)} of {len(MUTATIONS)} mutations")
        return
    print(f"building {len(MUTATIONS)} mutants into one build, as long as building the tests", flush=True)
    programs = [program for program in PROGRAMS if program in map(program_of, numbers)]
    binaries = build(folder, programs)

    begin = time.monotonic()
    for program in programs:
        killed, why = run(binaries / program, 0, 3600, "*")
        if killed:
            sys.exit(f"the tests fail without a mutation: {why}")
    timeout = 60 + 4 * (time.monotonic() - begin)
    print(f"unchanged: all tests pass, {time.monotonic() - begin:.0f} s", flush=True)

    def attempt(number: int) -> tuple[bool, str]:
        binary = binaries / program_of(number)
        killed, by = run(binary, number, timeout, SLOW)
        return (killed, by) if killed else run(binary, number, timeout, "*")

    wrong, kills = [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (killed, by) in zip(numbers, pool.map(attempt, numbers)):
            reason = MUTATIONS[number - 1][3]
            kills += killed
            verdict = f"killed by {by}" if killed else f"survives: {reason}" if reason else "SURVIVES"
            if killed == bool(reason):
                wrong.append(number)
            print(f"{describe(number)}: {verdict}", flush=True)
            results.note(MUTATIONS[number - 1], verdict)
    print(f"{kills} of {len(numbers)} mutants killed, {len(numbers) - kills} survive")
    if wrong:
        sys.exit(f"not as mutations.py says: {wrong}")


if __name__ == "__main__":
    main()
