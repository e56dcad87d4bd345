"""Every script of findings/ has a row of its own in docs/findings.md, with a version, and every row a script.

check_findings.py REPOSITORY
"""

import pathlib
import re
import sys


def main() -> int:
    """Prints what is missing, on either side."""
    root = pathlib.Path(sys.argv[1])
    rows = re.findall(
        r"^\| \[(.*?)\]\(\.\./findings/(.*?)\) \| (.*?) \|", (root / "docs/findings.md").read_text("utf-8"), re.M
    )
    scripts = {path.name for path in (root / "findings").glob("*.sh")}
    wrong = [
        f"{name} is listed {count} times, expected once"
        for name in sorted(scripts)
        if (count := sum(name == row[1] for row in rows)) != 1
    ]
    wrong += [f"{target} is listed and does not exist" for _, target, _ in rows if target not in scripts]
    wrong += [f"{target} is called '{name}'" for name, target, _ in rows if name != target]
    wrong += [
        f"the row of {target} names no version" for _, target, software in rows if not re.search(r"\d+\.\d+", software)
    ]
    for fault in wrong:
        print(f"docs/findings.md: {fault}", file=sys.stderr)
    print(f"{len(scripts)} findings")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
