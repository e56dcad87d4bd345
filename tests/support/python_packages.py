"""For tests in Python that need packages which the interpreter of ctest may lack."""

import importlib.util
import os
import sys


def need(packages: list[str], python: str | None, way_out: str) -> None:
    """Where a package is missing, runs the test again with `python`; where that one lacks it as well, or there is none,
    says so and the way out, and skips the test (ctest: 77)."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if python and not os.environ.get("LORA_RITE_TEST_AGAIN"):
        os.environ["LORA_RITE_TEST_AGAIN"] = "1"
        os.execvp(python, [python, *sys.argv])
    print(f"{sys.executable} has no {', '.join(missing)}; {way_out}")
    sys.exit(77)
