#!/usr/bin/env python3
"""Regenerates regex_golden.json: what Python's re makes of patterns, for python_regex_test.cpp.

    python3 make_regex_golden.py   # Python 3.11 or later

- cases: patterns with the texts of a list that re.fullmatch takes and those that re.match takes, as numbers
- errors: what re refuses
- refused: what re takes and the library refuses by name, with a part of the message
"""

import json
import pathlib
import random
import re
import warnings

warnings.simplefilter("ignore")
HERE = pathlib.Path(__file__).parent

NAMES = [
    "",
    "a",
    "b",
    "ab",
    "ba",
    "aab",
    "abab",
    "aaaa",
    "A",
    "aB",
    "q",
    "q_proj",
    "k_proj",
    "x.q_proj",
    "1",
    "01",
    "0",
    "]",
    "a]",
    "^",
    "-",
    "a-b",
    "\\",
    "a\nb",
    "a\n",
    "\n",
    " ",
    "a b",
    "ü",
    "über",
    "lm_head",
    "model.lm_head",
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.11.mlp.gate_proj",
    "model.vision_tower.layers.3.q_proj",
    "transformer.h.2.attn.c_attn",
    "encoder.layer.3.attention.self.query",
    "encoder.block.1.layer.0.SelfAttention.q",
    "base.{2}",
    "a{,2",
    "aa{",
    "a.b.c",
    "a..b",
    "x" * 40,
]

# What people write for PEFT, and every corner of the syntax.
PATTERNS = [
    r"",
    r"a",
    r"q_proj",
    r".*q_proj",
    r".*\.(q|k|v)_proj",
    r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
    r"^model\.layers\.0\..*$",
    r"\Amodel\..*\Z",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention).*?)|.*q_proj",
    r"^(?!.*vision_tower).*(q_proj|v_proj)$",
    r".*(?<!vision_tower\.layers\.3)\.q_proj",
    r"(?<=a)b",
    r"a(?<=a)b",
    r"(?<!a)b",
    r"a(?<!a)b|ab(?<=ab)",
    r"(?=.*q)(?!.*vision).*proj",
    r"(?P<layer>model\.layers\.(?P<number>\d+))\..*",
    r"(?i)Q_PROJ",
    r"(?i:A)b",
    r"a(?-i:b)",
    r"(?i)a(?-i:b)",
    r"(?s)a.b",
    r"a.b",
    r"(?m)a$.*",
    r"(?m)a\n^b",
    r"a$\n",
    r"a$",
    r"a\Z",
    r"a\Z\n",
    r"\n$",
    r"$",
    r"^",
    r"^^a$$",
    r"(?a)\w+",
    r"\w+",
    r"\W",
    r"[\w]+",
    r"[^\W\d_]+",
    r"\D+",
    r"\S+",
    r"\s",
    r"[\s]",
    r"a\sb",
    r"\d+",
    r"[\d]",
    r"[^]1]",
    r"[]1]+",
    r"[]]",
    r"[^]]+",
    r"[]\-a]+",
    r"[a-]+",
    r"[-a]+",
    r"[a\-b]+",
    r"[a-c]+",
    r"[^a-c]+",
    r"[\]a]+",
    r"[\\]",
    r"[^^]",
    r"[\^]",
    r"[\b]",
    r"[[:alpha:]]",
    r"[.]",
    r"[.a]+",
    r"[|a]",
    r"[a\n]+b?",
    r"[\x61-\x63]+",
    r"\060",
    r"\0601?",
    r"0\061",
    r"\x61",
    r"\x61b",
    r"\u0061",
    r"\U00000061",
    r"\u00fc",
    r"[\u00fc]ber",
    r"ü",
    r"[ü-ÿ]",
    r"ü*ber",
    r"\08",
    r"\141",
    r"[\141]",
    r"\-",
    r"\_",
    r"\.",
    r"\]",
    r"\{",
    r"a\{,2",
    r"a{,2",
    r"base\.{2}",
    r"base\.\{2\}",
    r"aa{",
    r"a{2}b",
    r"a{2,}",
    r"a{,2}",
    r"a{,}",
    r"a{1,3}b",
    r"(ab){2}",
    r"(a|b){3}",
    r"a{0}b",
    r"a{0,0}",
    r"x{40}",
    r"x{39}",
    r"x{1,39}x",
    r"{}",
    r"a{}",
    r"a*?b",
    r"a+?b",
    r"a??b",
    r"a{1,2}?b",
    r"(a*)*b",
    r"(a*)+",
    r"(a|b*)*",
    r"(|a)+",
    r"(a||b)",
    r"|a",
    r"a|",
    r"()",
    r"(?:)",
    r"(?:a|ab)(?:c|b)",
    r"((a)(b))",
    r"a(?#what)b",
    r"(?#what)a",
    r"\bq_proj\b",
    r"x\.\bq_proj",
    r"a\b b",
    r"a\Bb",
    r"\B",
    r"\b",
    r".*\b1\b.*",
    r"(?=a)ab",
    r"(?=b)ab",
    r"(?!b)ab",
    r"(?=a)*a",
    r"(?:^a)?b*",
    r"(^a|b)+",
    r"(?=(?=a)a)a",
    r"(?<=(?<=a)b)",
    r"ab(?<=(?<=a)b)",
    r"a(?!b)",
    r"(?!)",
    r"(?=)",
    r"(?i:a|B)+",
    r"(?i)[a-b]+",
    r"(?i)[^a]",
    r"(?si)A.B",
    r"(?i)(?s)A.B",
    r"(?as:\w.)",
    r"(?u)\w+",
    r"(?i)|Q",
    r".",
    r"..",
    r".?",
    r".+",
    r".*",
    r"(.*\.)?(lm_head)",
    r"[\da-]+",
    r"[a-z_]+\.[a-z_]+",
    r"model\.layers\.(?:[0-9]|1[0-1])\.(?:self_attn|mlp)\.\w+",
    r"(?:model\.)?(?:lm_head|embed_tokens)",
    r"\a?\f?\r?\t?\v?a",
]
ERRORS = [
    r"(",
    r")",
    r"a)",
    r"(a",
    r"[",
    r"[]",
    r"[^]",
    r"[a",
    r"[a-",
    r"[b-a]",
    r"[\d-a]",
    r"[a-\d]",
    r"*",
    r"+a",
    r"?",
    r"{2}",
    r"a**",
    r"a+*",
    r"a{2}{3}",
    r"a*?*",
    r"a{3,2}",
    r"^*",
    r"\b+",
    r"a|*",
    r"(*)",
    r"(?",
    r"(?P",
    r"(?P<",
    r"(?P<1>a)",
    r"(?P<>a)",
    r"(?P<a b>c)",
    r"(?P<n>a)(?P<n>b)",
    r"(?<name>a)",
    r"(?Pa)",
    r"(?z)",
    r"(?)",
    r"(?-:a)",
    r"(?i-)",
    r"(?i-i)",
    r"(?-a:b)",
    r"(?L)a",
    r"(?au)b",
    r"(?a)(?u)b",
    r"a(?i)b",
    r"(a(?i))",
    r"|(?i)b",
    r"(?i)*",
    r"(?#",
    r"(?=a",
    r"(?<=a+)b",
    r"(?<=a|bc)d",
    r"(?<!a*)b",
    r"\y",
    r"\c",
    r"[\A]",
    r"\x6",
    r"\xg1",
    r"\u006",
    r"\U0000006",
    r"\U00110000",
    r"[\8]",
    r"\400",
    r"[\777]",
    "\\",
    "a\\",
    "[\\",
    r"(?i",
    r"(?:a",
]
REFUSED = {
    r"(a)\1": "a back-reference",
    r"(?P<n>a)(?P=n)": "a back-reference",
    r"(a)?(?(1)b|c)": "a condition",
    r"(?>a*)b": "an atomic group",
    r"a*+b": "a possessive quantifier",
    r"a{1,2}+": "a possessive quantifier",
    r"a?+": "a possessive quantifier",
    r"(?x) a b": "the flag x",
    r"\N{LATIN SMALL LETTER A}": "a character by its name",
    r"[\N{DIGIT ONE}]": "a character by its name",
    r"(?i)ü": "beyond ASCII under the flag i",
    r"(?i)[a-ü]": "beyond ASCII under the flag i",
}


def generated(count: int) -> list[str]:
    """Expressions of short pieces, put together at random: those that re takes."""
    random.seed(1)
    pieces = [
        "a",
        "b",
        "ab",
        ".",
        r"\.",
        r"\d",
        r"\w",
        "[ab]",
        "[^a]",
        "q_proj",
        "^",
        "$",
        r"\b",
        "layers",
        "0",
        "1",
        "_",
        "model",
        "x",
    ]

    def expression(depth: int) -> str:
        parts = []
        for _ in range(random.randint(1, 3)):
            kind = random.random()
            if depth > 0 and kind < 0.35:
                part = random.choice(
                    ["(%s)", "(?:%s)", "(?=%s)", "(?!%s)", "(?<=%s)", "(?<!%s)", "(?i:%s)"]
                ) % expression(depth - 1)
                part += random.choice(
                    ["", "", "", "?", "{2}", "{1,2}"]
                )  # Python's time would be exponential with stars
            else:
                part = random.choice(pieces)
                if random.random() < 0.35:
                    part += random.choice(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{2,}"])
            parts.append(part)
        return "".join(parts) + ("|" + expression(depth - 1) if depth > 0 and random.random() < 0.3 else "")

    found = []
    while len(found) < count:
        pattern = expression(3)
        try:
            compiled = re.compile(pattern)
        except (re.error, ValueError):
            continue
        if any(map(compiled.match, NAMES)) and len(pattern) < 60:
            found.append(pattern)
    return found


def main() -> None:
    cases = []
    for pattern in PATTERNS + generated(400):
        compiled = re.compile(pattern)
        cases.append(
            {
                "pattern": pattern,
                "full": [i for i, name in enumerate(NAMES) if compiled.fullmatch(name)],
                "match": [i for i, name in enumerate(NAMES) if compiled.match(name)],
            }
        )
    for pattern in ERRORS:
        try:
            re.compile(pattern)
        except (re.error, ValueError):
            continue
        raise AssertionError(f"Python takes {pattern}")
    for pattern in REFUSED:
        re.compile(pattern)
    golden = {"names": NAMES, "cases": cases, "errors": ERRORS, "refused": REFUSED}
    (HERE / "regex_golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
