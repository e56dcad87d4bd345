#!/usr/bin/env python3
"""Writes golden/scores.json: what the packages and regular expressions that others score with say about a few texts.

Packages: rouge_score==0.1.2 (ROUGE-L without stemmer). The numbers are found with the regular expressions of
EleutherAI's lm-evaluation-harness for gsm8k, exact matches as Tk-Instruct normalises texts.
"""

import json
import pathlib
import re
import string
import sys

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
    # Capitals that Python lowers into ASCII, U+0130 and U+212A, and others.
    ("\u0130stanbul is big", ["istanbul is big", "i stanbul is big"]),
    ("300 \u212aELVIN", ["300 kelvin"]),
    ("\u212a", ["k"]),
    ("\u00c9T\u00c9 \u00c0 PARIS", ["\u00e9t\u00e9 \u00e0 Paris"]),
    ("\u041c\u041e\u0421\u041a\u0412\u0410!", ["\u043c\u043e\u0441\u043a\u0432\u0430"]),
    (
        "\u039f\u0394\u039f\u03a3 \u03a3\u039f\u03a6\u039f\u03a3",
        ["\u03bf\u03b4\u03bf\u03c2 \u03c3\u03bf\u03c6\u03bf\u03c2"],
    ),
    ("\u039f\u0394\u039f\u03a3", ["\u03bf\u03b4\u03bf\u03c3"]),
    ("\u03a3", ["\u03c3"]),
    ("no\u00a0break \u3000 here", ["no break here"]),
    ("zero\u200bwidth", ["zero width"]),
    ("\U00010400", ["\U00010428"]),
    ("stra\u00dfe STRASSE", ["STRASSE stra\u00dfe", "STRA\u1e9eE strasse"]),
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


def lower_cases() -> dict:
    """What str.lower() makes of each code point alone: those that become ASCII, and all of them in one number."""
    codes = [code for code in range(128, sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    return {
        "ascii": {chr(code): chr(code).lower() for code in codes if re.search("[a-z0-9]", chr(code).lower())},
        "sum": str(sum(code * sum(map(ord, chr(code).lower())) for code in codes) % 2**64),
        "spaces": "".join(chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()),
    }


def main() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    texts = [
        {
            "prediction": prediction,
            "references": references,
            "rouge_l": max(
                scorer.score(target=reference, prediction=prediction)["rougeL"].fmeasure for reference in references
            ),
            "exact_match": any(normalise(reference) == normalise(prediction) for reference in references),
        }
        for prediction, references in PAIRS
    ]
    numbers = [{"text": text, "strict": strict(text), "flexible": flexible(text)} for text in NUMBERS]
    path = pathlib.Path(__file__).parent / "golden/scores.json"
    path.write_text(
        json.dumps({"texts": texts, "numbers": numbers, "lower_case": lower_cases()}, indent=1, ensure_ascii=False)
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
