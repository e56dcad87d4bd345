#!/usr/bin/env python3
"""Makes one page of all that was measured: page.py RESULTS_FOLDER... --out report.html

The page needs no other file and no network. It takes invariance.csv, report.md, study.md and their pictures from
whichever folder has them (the first one wins). What no folder has is left out; a line says which command makes it.
"""

import argparse
import base64
import csv
import html
import pathlib
import re
import runpy
import struct
import xml.etree.ElementTree as etree
from collections.abc import Callable
from datetime import date

import markdown
from markdown.extensions import Extension
from markdown.extensions.toc import TocExtension
from markdown.treeprocessors import Treeprocessor

BENCH = pathlib.Path(__file__).resolve().parents[1]
CELL_MAGNITUDE = 100  # of κ(T), or of the number, in the invariance table
SCROLL = {"class": "scroll", "tabindex": "0"}  # by keys too
ROUND_OFF = {"double": 2.0**-53, "float": 2.0**-24}

# Of every picture: what it shows, for those who cannot see it, and how to read it.
PICTURES = {
    "invariance.png": (
        "Difference of ΔW between equivalent starts against κ(T), one panel a kind of T and number format",
        "Flat or rising along the dashed line: only round-off remains. Around 1: two different models.",
    ),
    "feature_learning.png": (
        "Change of a layer's output by a step of A and by a step of B, against the width",
        "Two level lines: both factors learn at every width. A falling one is a factor that hardly learns in a wide "
        "layer, a rising one a factor whose steps grow without bound.",
    ),
    "targets.png": (
        "Bars: LoRA-RITE's time a step divided by AdamW's, one a case",
        "The vertical line is AdamW, the black marks are the targets.",
    ),
    "scaling.png": (
        "Nanoseconds an element against the number of pairs, the width and the rank",
        "Time of a step divided by the elements of the factors; lower is faster.",
    ),
    "study-regression-rates.png": (
        "Regressions: validation error against the learning rate",
        "Low is good, and a wide valley is a rate that is hard to miss.",
    ),
    "study-regression-curves.png": ("Regressions: error against the step", "Each optimizer at its own best rate."),
    "study-minilm-rates.png": (
        "MiniLM: validation loss against the learning rate",
        "Low is good, and a wide valley is a rate that is hard to miss.",
    ),
    "study-minilm-curves.png": ("MiniLM: training loss against the step", "Each optimizer at its own best rate."),
    "study-smollm2-rates.png": (
        "SmolLM2-135M: validation loss against the learning rate",
        "Low is good, and a wide valley is a rate that is hard to miss.",
    ),
    "study-smollm2-curves.png": (
        "SmolLM2-135M: training loss against the step",
        "Each optimizer at its own best rate.",
    ),
    "study-options-rates.png": (
        "LoRA-RITE's options: validation loss against the learning rate",
        "Where they were tried; Adam's line for comparison.",
    ),
}


class Files:
    """The results' folders, seen as one."""

    def __init__(self, folders: list[pathlib.Path]):
        self.folders = folders

    def find(self, name: str) -> pathlib.Path | None:
        return next((folder / name for folder in self.folders if (folder / name).is_file()), None)

    def pictures(self, pattern: str) -> list[str]:
        """Names in the order of PICTURES, others after them."""
        names = {path.name for folder in self.folders for path in folder.glob(pattern)}
        return sorted(names, key=lambda name: (list(PICTURES).index(name) if name in PICTURES else len(PICTURES), name))


class SelfContained(Treeprocessor):
    """Pictures become figures that hold their data; tables get a container in which a narrow screen can scroll them."""

    def __init__(self, files: Files):
        super().__init__()
        self.files = files

    def figure(self, paragraph: etree.Element, picture: etree.Element) -> None:
        name = pathlib.PurePosixPath(picture.get("src")).name
        alt, caption = PICTURES.get(name, (picture.get("alt"), picture.get("alt")))
        path = self.files.find(name)
        if not path:
            paragraph.remove(picture)
            paragraph.text = f"({name} is missing.)"
            return
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # where every PNG has them
        # Drawn for paper at 130 to 150 dots an inch: at this size their letters are as large as the table's.
        size = {"width": str(round(0.6 * width)), "height": str(round(0.6 * height))}
        source = "data:image/png;base64," + base64.b64encode(data).decode()
        paragraph.tag, paragraph.text = "figure", None
        paragraph.remove(picture)
        box = etree.SubElement(paragraph, "div", SCROLL)
        etree.SubElement(box, "img", {"src": source, "alt": alt, **size})
        etree.SubElement(paragraph, "figcaption").text = caption

    def run(self, root: etree.Element) -> None:
        for parent in list(root.iter()):
            for place, child in enumerate(list(parent)):
                if child.tag == "table":
                    box = etree.Element("div", SCROLL)
                    parent[place] = box
                    box.append(child)
                elif child.tag == "p" and len(child) == 1 and child[0].tag == "img":
                    self.figure(child, child[0])


class SelfContainedExtension(Extension):
    def __init__(self, files: Files):
        super().__init__()
        self.files = files

    def extendMarkdown(self, md: markdown.Markdown) -> None:  # noqa: N802, the library's name
        md.treeprocessors.register(SelfContained(self.files), "self-contained", 15)  # the images are made at 20


def invariance_table(path: pathlib.Path) -> str:
    with open(path, encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["kind"] == "rotation" or float(row["magnitude"]) == CELL_MAGNITUDE
        ]
    columns = list(dict.fromkeys((row["kind"], row["dtype"]) for row in rows))
    values = {(row["optimizer"], row["kind"], row["dtype"]): float(row["after_all_steps"]) for row in rows}

    def cell(optimizer: str, kind: str, dtype: str) -> str:
        value = values.get((optimizer, kind, dtype), float("nan"))
        condition = CELL_MAGNITUDE if kind in ("diagonal", "general") else 1
        text = f"{value:.2g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")
        text = text.replace("inf", "∞")
        return f"**{text}**" if value <= 1000 * ROUND_OFF[dtype] * condition else text

    lines = [["optimizer", *(f"{kind}, {dtype}" for kind, dtype in columns)], ["---"] * (len(columns) + 1)]
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        lines.append([optimizer, *(cell(optimizer, kind, dtype) for kind, dtype in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def nested(path: pathlib.Path) -> str:
    """A report's Markdown without its title, its headings below a section's."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^## ", "### ", re.sub(r"^# .*\n", "", text), flags=re.MULTILINE)


def section(
    files: Files,
    title: str,
    command: str,
    name: str,
    body: Callable[[pathlib.Path], str],
    pictures: list[str],
    introduction: str,
) -> str:
    """In Markdown. `body` makes Markdown of the file `name`, without which there is no section."""
    path = files.find(name)
    if not path:
        return f"*{title}: not measured yet; `{command}` does it.*"
    text = body(path)
    parts = [f"## {title}", introduction]
    if not text.lstrip().startswith("Written by"):  # says when and where itself
        day = date.fromtimestamp(path.stat().st_mtime).isoformat()
        parts.append(f"Written by `{command}` on {day}.")
    parts += [text] + [f"![]({picture})" for picture in pictures if files.find(picture)]
    return "\n\n".join(['<section markdown="1">', *parts, "</section>"])


def page(files: Files) -> str:
    sections = [
        section(
            files,
            "Invariance",
            "scripts/bench",
            "invariance.csv",
            invariance_table,
            ["invariance.png", "feature_learning.png"],
            "The factors (A, B) and (TA, BT⁻¹) are the same layer ΔW = BA. Every optimizer trains a small network "
            "from both, and the table says how far apart the two ΔW are after 20 steps, divided by the way that ΔW "
            f"went; T is the number {CELL_MAGNITUDE}, a diagonal or a general matrix with κ(T) = {CELL_MAGNITUDE}, "
            "or a rotation. **Bold**: nothing but round-off (a thousand units of it, times κ); around 1, the "
            "optimizer trains two different models.",
        ),
        section(
            files,
            "Speed",
            "scripts/bench",
            "report.md",
            nested,
            [],
            "Time of one optimizer step, without the model's forward and backward pass. ÷ AdamW is the ratio to "
            "`torch::optim::AdamW` on the same factors: below 1, LoRA-RITE is faster.",
        ),
        section(
            files,
            "Quality",
            "scripts/study",
            "study.md",
            nested,
            files.pictures("study-*.png"),
            "Every optimizer at its own best learning rate, found on validation data, then run with fresh seeds on "
            "test data; the best comes first. Good rates are those nearly as good as the best (5 % more "
            "loss, or √10 times the error): a wide range is hard to miss. ± and ×/÷ are over the seeds, and "
            "steps to Adam's end is the part of the steps after which an optimizer is where Adam ends.",
        ),
    ]
    converter = markdown.Markdown(
        output_format="html",
        extensions=["tables", "md_in_html", "attr_list", TocExtension(toc_depth="2-3"), SelfContainedExtension(files)],
    )
    body = converter.convert("\n\n".join(sections))
    style = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    machine = runpy.run_path(str(BENCH / "report.py"))["machine"]()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LoRA-RITE: invariance, speed, quality</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>LoRA-RITE: invariance, speed, quality</h1>
<p class="soft">This page was made on {date.today().isoformat()}, on {html.escape(machine)}.</p>
</header>
<nav aria-label="Contents">{converter.toc}</nav>
<main>
{body}
</main>
</body>
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="folders of scripts/study and scripts/bench")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the page")
    options = parser.parse_args()
    options.out.write_text(page(Files(options.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
