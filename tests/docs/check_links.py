"""Every relative link in the documents leads somewhere: to a file or folder of the repository, and to a heading in it.

The index docs/README.md leads to every document of docs/.

    check_links.py REPOSITORY

Looks at all Markdown files that git would keep, outside of folders that hold data. Anchors are formed as GitHub does:
lower case, without punctuation, spaces as hyphens, and a number behind the second of two equal ones.
"""

import pathlib
import re
import sys
import unicodedata
from urllib.parse import unquote

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


def documents(root: pathlib.Path) -> "list[pathlib.Path]":
    """The Markdown files that people write."""
    found = [*root.glob("*.md"), *(root / ".github").rglob("*.md")]
    for folder in ("docs", "examples", "python", "packaging", "bench"):
        found += (root / folder).rglob("*.md")
    return sorted(path for path in found if "build" not in path.parts)


def without_code(text: str) -> str:
    """The text without blocks of code and comments."""
    return COMMENT.sub("", FENCE.sub("", text))


def slug(heading: str) -> str:
    """The anchor of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    keep = (c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN" or unicodedata.category(c) == "Mn")
    return "".join(keep).replace(" ", "-")


def heading_anchors(text: str) -> "list[str]":
    """The anchors of a document's headings, in order."""
    found: list[str] = []
    for heading in HEADING.findall(without_code(text)):
        first = name = slug(heading)
        number = 0
        while name in found:
            number += 1
            name = f"{first}-{number}"
        found.append(name)
    return found


def anchors(text: str) -> "set[str]":
    """All anchors of a document."""
    return {*heading_anchors(text), *re.findall(r'<a (?:id|name)="([^"]+)"', text)}


def links(document: pathlib.Path) -> "list[str]":
    """Where the links of a document lead, as they are written."""
    return LINK.findall(CODE.sub("", without_code(document.read_text(encoding="utf-8"))))


def faults(root: pathlib.Path, document: pathlib.Path) -> "list[str]":
    """What is wrong with the links of a document."""
    result = []
    for target in links(document):
        if re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
            continue
        path, _, anchor = target.partition("#")
        place = (document.parent / unquote(path)).resolve() if path else document
        if not place.exists():
            result.append(f"({target}) leads to no file")
        elif root not in [place, *place.parents]:
            result.append(f"({target}) leads out of the repository")
        elif anchor and place.suffix == ".md" and unquote(anchor) not in anchors(place.read_text(encoding="utf-8")):
            result.append(f"({target}) leads to no heading of {place.relative_to(root)}")
    return result


def not_in_index(root: pathlib.Path) -> "list[str]":
    """The documents of docs/ that its index does not lead to."""
    index = root / "docs/README.md"
    known = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    missing = sorted(path for path in (root / "docs").rglob("*.md") if path not in known and path != index)
    return [f"docs/README.md: does not lead to {path.relative_to(root)}" for path in missing]


def main() -> int:
    """Prints every link that leads nowhere, and every document that nothing leads to."""
    root = pathlib.Path(sys.argv[1]).resolve()
    found = documents(root)
    wrong = [f"{document.relative_to(root)}: {fault}" for document in found for fault in faults(root, document)]
    wrong += not_in_index(root)
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    print(f"{len(found)} documents")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
