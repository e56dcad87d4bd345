"""A Markdown document as Doxygen wants a page: with labels on its headings, and links that lead to pages.

    docs_page.py DOCUMENT

The filter that Doxyfile names. In the repository documents are plain Markdown, whose links lead to files, and to
headings by GitHub's anchors; Doxygen knows neither. A link to what is no page, such as a source, goes, and its text
stays. Lines keep their numbers.
"""

import functools
import os
import pathlib
import re
import sys
from urllib.parse import unquote

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/docs"))
from check_links import CODE, FENCE, HEADING, LINK, heading_anchors  # noqa: E402

CODE_OR_LINK = re.compile(rf"{CODE.pattern}|(!?){LINK.pattern}")


@functools.cache
def paths(setting: str) -> "list[pathlib.Path]":
    """The files and folders that a setting of Doxyfile names."""
    found = re.search(rf"^{setting}\s*=(.*)$", (ROOT / "Doxyfile").read_text(encoding="utf-8"), re.MULTILINE)
    return [ROOT / path for path in found[1].split()] if found else []


def label(document: pathlib.Path) -> str:
    """The name of a page: docs/internals/study.md is docs-internals-study.html."""
    if document in paths("USE_MDFILE_AS_MAINPAGE"):
        return "index"
    return "-".join(document.relative_to(ROOT).with_suffix("").parts)


def is_page(path: pathlib.Path) -> bool:
    """Is it a document of the reference?"""
    return path.suffix == ".md" and any(place in [path, *path.parents] for place in paths("INPUT"))


def section(document: pathlib.Path, anchor: str) -> str:
    """The name of a heading, which Doxygen wants to be the only one of its kind."""
    return f"{label(document)}__{anchor}"


def with_links(text: str, document: pathlib.Path) -> str:
    """Text without blocks of code, its links made those of pages."""

    def link(match: "re.Match[str]") -> str:
        _, image, target = match.groups()
        if target is None or re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
            return match[0]
        words = match[0].rpartition("](")[0].removeprefix(image + "[")
        path, _, anchor = target.partition("#")
        place = pathlib.Path(os.path.normpath(document.parent / unquote(path))) if path else document
        if image:
            return f"![{words}]({place.name})"
        if not is_page(place):
            return words
        return f"[{words}]({label(place)}.html{'#' + section(place, anchor) if anchor else ''})"

    return CODE_OR_LINK.sub(link, text)


def page(document: pathlib.Path) -> str:
    """The whole document."""
    text = document.read_text(encoding="utf-8")
    sections = (section(document, anchor) for anchor in heading_anchors(text)[1:])
    names = iter([label(document), *sections])

    def heading(match: "re.Match[str]") -> str:
        name = next(names)
        end = match.end(1) - match.start()
        # The first page has its name from Doxygen.
        return match[0] if name == "index" else f"{match[0][:end]} {{#{name}}}{match[0][end:]}"

    parts, end = [], 0
    for block in FENCE.finditer(text):
        parts += [HEADING.sub(heading, with_links(text[end : block.start()], document)), block[0]]
        end = block.end()
    return "".join([*parts, HEADING.sub(heading, with_links(text[end:], document))])


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(page(pathlib.Path(sys.argv[1]).resolve()), end="")
