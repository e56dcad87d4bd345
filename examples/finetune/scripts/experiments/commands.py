"""Says things, reads and writes files, runs commands."""

import json
import pathlib
import shlex
import subprocess
import sys

from whole_file import whole_file


def say(*words) -> None:
    print("reproduce:", *words, flush=True)


def read_json(path: pathlib.Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(f"reproduce: {path}: cannot be read ({error.strerror})")
    except ValueError as error:
        sys.exit(f"reproduce: {path}: is no JSON ({error})")


def read_lines(path: pathlib.Path) -> list[str]:
    # Not by splitlines: a text may hold a separator that only Python takes for the end of a line.
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text)


class Commands:
    """Runs commands, or prints them."""

    def __init__(self, dry: bool):
        self.dry = dry

    def run(self, *words) -> None:
        command = [str(word) for word in words]
        if self.dry:
            print(shlex.join(command))
            return
        say(shlex.join(command))
        with subprocess.Popen(command) as process:
            while True:  # Ctrl-C reaches the program, too, which saves before it ends
                try:
                    code = process.wait()
                    break
                except KeyboardInterrupt:
                    pass
        if code != 0:
            if code in (130, -2):
                say("stopped; the same command goes on")
                sys.exit(130)
            sys.exit(
                f"reproduce: ended with code {code}: {shlex.join(command)}\n"
                "reproduce: mend it and give the same command again, which goes on"
            )
