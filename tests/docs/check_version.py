"""The version of version.hpp is that of CITATION.cff, the packages, the README's tag and CHANGELOG.md's newest entry.

check_version.py REPOSITORY
"""

import json
import pathlib
import re
import sys


def main() -> int:
    """Prints where another version stands."""
    root = pathlib.Path(sys.argv[1])
    read = lambda name: (root / name).read_text(encoding="utf-8")
    first = lambda pattern, name: (re.findall(pattern, read(name), re.MULTILINE) or ["none"])[0]
    version = ".".join(re.findall(r"#define LORA_RITE_VERSION_\w+ (\d+)", read("include/lora_rite/version.hpp")))
    found = {
        "CITATION.cff": first(r"^version: (.*)$", "CITATION.cff"),
        "CHANGELOG.md": first(r"^## (\S+)", "CHANGELOG.md"),
        **{name: first(r"GIT_TAG v([\d.]+\d)", name) for name in ("README.md", "docs/install.md")},
        "packaging/vcpkg/lora-rite/vcpkg.json": json.loads(read("packaging/vcpkg/lora-rite/vcpkg.json"))["version"],
    }
    wrong = {name: there for name, there in found.items() if there != version}
    for name, there in wrong.items():
        print(f"{name}: the version is {there}, expected {version}, as in version.hpp", file=sys.stderr)
    print(f"version {version}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
