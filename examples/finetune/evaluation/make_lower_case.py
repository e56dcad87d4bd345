#!/usr/bin/env python3
"""Writes lower_case_table.hpp beside this file: which code points Python's str.lower() and str.isspace() know. Run by
hand; the file is committed."""

import pathlib
import sys
import unicodedata

HEADER = """#pragma once

#include <cstdint>

// Written by make_lower_case.py: Unicode {version}, as Python {python} has it.

namespace finetune {{

/// Code points first, first + stride, …, last, each of which becomes itself + shift in lower case.
struct LowerCaseRange {{
  char32_t first, last;
  int32_t stride, shift;
}};

/// Sorted and disjoint. U+0130 is not among them: it becomes two code points.
constexpr LowerCaseRange kLowerCase[] = {{
{ranges}
}};

/// What str.split() splits at, sorted.
constexpr char32_t kSpaces[] = {{
{spaces}
}};

}}  // namespace finetune
"""


def filled(entries: list[str]) -> str:
    lines = [""]
    for entry in entries:
        if len(lines[-1]) + len(entry) > 114:
            lines.append("")
        lines[-1] += entry + ", "
    return "\n".join("    " + line.rstrip() for line in lines)


def main() -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    changed = [character for character in characters if character.lower() != character]
    assert [c for c in changed if len(c.lower()) > 1] == ["\u0130"]
    ranges: list[list[int]] = []
    for code in map(ord, changed):
        if code == 0x130:
            continue
        shift = ord(chr(code).lower()) - code
        if (
            ranges
            and ranges[-1][3] == shift
            and code - ranges[-1][1] == (ranges[-1][2] or min(code - ranges[-1][1], 2))
        ):
            ranges[-1][1:3] = code, code - ranges[-1][1]
        else:
            ranges.append([code, code, 0, shift])
    path = pathlib.Path(__file__).with_name("lower_case_table.hpp")
    path.write_text(
        HEADER.format(
            version=unicodedata.unidata_version,
            python=sys.version.split()[0],
            ranges=filled(
                [f"{{0x{first:X}, 0x{last:X}, {stride or 1}, {shift}}}" for first, last, stride, shift in ranges]
            ),
            spaces=filled([f"0x{ord(c):X}" for c in characters if c.isspace()]),
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
