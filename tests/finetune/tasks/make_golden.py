#!/usr/bin/env python3
"""Writes golden/scores.json: what the packages and regular expressions that others score with say about a few texts.

Packages: rouge_score==0.1.2 (ROUGE-L without stemmer). The numbers are found with the regular expressions of
EleutherAI's lm-evaluation-harness for gsm8k, exact matches as Tk-Instruct normalises texts.
"""

import json
import pathlib
import re
import string

from rouge_score import rouge_scorer

PAIRS = [
    ("the cat sat on the mat", ["the cat lay on a mat"]),
    ("The CAT, sat... on-the mat!", ["the cat sat on the mat"]),
    ("police killed the gunman", ["police kill the gunman", "the gunman police killed"]),
    ("", ["something"]),
    ("something", ["..."]),
    ("a b c d e f g", ["g f e d c b a"]),
    ("x1 y2 z3 x1", ["x1 z3 x1 y2", "y2"]),
    ("running runners ran", ["run runner ran"]),
    ("naïve café visit", ["naive cafe visit"]),
    ("one\ttwo\nthree  four", ["two four"]),
    ("Yes", ["yes."]),
    ("It's  fine", ["its fine", "nothing"]),
    ("the the the cat", ["the cat the", "the end"]),
    ("under_score", ["under score"]),
]

NUMBERS = [
    "She has 3 + 4 = 7 apples.\n#### 7",
    "#### 1,234.",
    "#### -5\n\nQuestion: another\n#### 6",
    "#### $18",
    "####18",
    "The answer is $1,250.00.",
    "It is 12.5% or 1/8",
    "between 3-4 hours",
    "minus -7",
    "none at all",
    "...",
    "a - b",
    "5",
    "$5",
    "$ 5",
    "-$5",
    "--6",
    "7, 8, and 9.",
    "7 apples, really",
    "#### x then #### 10",
    "#### .",
    "#### -",
    "1,2,3 go",
    "-",
    "",
]

STRICT, FLEXIBLE = r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
IGNORED = [",", r"\$", r"(?s).*#### ", r"\.$"]


def bare(text: str) -> str:
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def strict(text: str) -> str:
    found = re.findall(STRICT, text)
    return bare(found[0]) if found else ""


def flexible(text: str) -> str:
    found = re.findall(FLEXIBLE, text)
    return bare(next(part for part in found[-1] if part)) if found else ""


def normalise(text: str) -> str:
    return " ".join("".join(c for c in text.lower() if c not in string.punctuation).split())


def main() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    texts = [{"prediction": prediction, "references": references,
              "rouge_l": max(scorer.score(target=reference, prediction=prediction)["rougeL"].fmeasure
                             for reference in references),
              "exact_match": any(normalise(reference) == normalise(prediction) for reference in references)}
             for prediction, references in PAIRS]
    numbers = [{"text": text, "strict": strict(text), "flexible": flexible(text)} for text in NUMBERS]
    path = pathlib.Path(__file__).parent / "golden/scores.json"
    path.write_text(json.dumps({"texts": texts, "numbers": numbers}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
