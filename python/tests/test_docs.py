"""The Python of the documents runs as it stands.

What a block takes for granted stands before it in a comment that readers do not see: <!-- given: statements -->
"""

import pathlib
import re
import tempfile
import unittest
import warnings

import torch
from test_programs import Tokens, adapted, base

import toy

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"(?:^<!-- given:(?P<given>(?:(?!-->).)*)-->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def batches(count):
    return [{"input_ids": text[None], "labels": text[None]} for text in Tokens(count).texts]


class Documents(unittest.TestCase):
    def test_every_block_of_python_runs(self):
        documents = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("**/*.md"), REPOSITORY / "python/README.md"]
        count = 0
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("error", ".*max_grad_norm")
            for document in documents:
                text = document.read_text(encoding="utf-8")
                names = {"torch": torch, "toy": toy, "adapted": adapted, "base": base, "batches": batches}
                names.update(folder=folder, dataset=Tokens(), model=adapted())
                names.update(peft_model=names["model"])
                for found in BLOCK.finditer(text):
                    line = text.count("\n", 0, found.start("code"))
                    exec((found["given"] or "").strip(), names)
                    exec(compile("\n" * line + found["code"], str(document), "exec"), names)
                    count += 1
        self.assertGreaterEqual(count, 8)


if __name__ == "__main__":
    unittest.main()
