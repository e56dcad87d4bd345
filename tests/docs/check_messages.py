"""Every heading of docs/troubleshooting.md is a message of the sources.

    check_messages.py REPOSITORY

A heading of the third level is a message in backticks, in which … stands for what varies. What stands between two … has
to occur in the texts of one source file, in this order and not far apart: where the next piece follows it in the
file's texts.
"""

import pathlib
import re
import sys

TREES = ["include", "examples", "python", "scripts", "cmake"]
SUFFIXES = {".hpp", ".inc", ".cpp", ".py", ".cmake", ""}
LITERAL = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
NEAR = 400  # characters between two pieces, of texts alone
FEWEST = 25


def texts_of(path: pathlib.Path) -> str:
    """What stands between the double quotes of a file, one after the other."""
    source = path.read_text(encoding="utf-8", errors="replace")
    found = "".join(match[1] for match in LITERAL.finditer(source))
    return found.replace("\\n", "\n").replace('\\"', '"')


def occurs(pieces: "list[str]", texts: str) -> bool:
    """Are the pieces there in this order, each near the one before?"""
    begin = texts.find(pieces[0])
    while begin >= 0:
        end = begin + len(pieces[0])
        for piece in pieces[1:]:
            at = texts.find(piece, end, end + NEAR + len(piece))
            if at < 0:
                break
            end = at + len(piece)
        else:
            return True
        begin = texts.find(pieces[0], begin + 1)
    return False


def pieces_of(message: str) -> "list[str]":
    """The parts of a message that do not vary; a quote or a brace may be the edge of what varies."""
    return [piece.strip() for piece in message.split("…") if piece.strip(" ,:;(.")]


def main() -> int:
    """Prints every heading that is no message."""
    root = pathlib.Path(sys.argv[1])
    page = root / "docs/troubleshooting.md"
    headings = re.findall(r"^### (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    files = [
        path
        for tree in TREES
        for path in sorted((root / tree).rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    ]
    texts = [texts_of(path) for path in files]
    wrong = [heading for heading in headings if not re.fullmatch(r"`[^`]+`", heading)]
    for heading in headings:
        if heading not in wrong and not any(occurs(pieces_of(heading.strip("`")), text) for text in texts):
            wrong.append(heading)
    for heading in wrong:
        print(f"{page.name}: no source has the message of the heading {heading}", file=sys.stderr)
    if len(set(headings)) != len(headings) or len(headings) < FEWEST:
        print(f"{page.name}: {len(headings)} headings, expected {FEWEST} or more, each once", file=sys.stderr)
        return 1
    print(f"{len(headings)} messages")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
