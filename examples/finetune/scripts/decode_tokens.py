#!/usr/bin/env python3
"""Turns token ids into text: reads one line of space-separated ids a text, writes one JSON string a line, without
special tokens. The C++ side calls it on what a model generated."""

import argparse
import json
import sys

import tokenizer_file
from whole_file import whole_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="the model's tokenizer.json")
    parser.add_argument("--input", required=True, help="ids, one text a line")
    parser.add_argument("--output", required=True, help="file to write")
    options = parser.parse_args()

    tokenizer = tokenizer_file.load(options.tokenizer)
    with open(options.input, encoding="utf-8") as file:
        texts = tokenizer.decode_batch([[int(token) for token in line.split()] for line in file])
    with whole_file(options.output) as file:
        file.writelines(json.dumps(text) + "\n" for text in texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
