#!/usr/bin/env python3
"""Turns sentences into the token ids of a model.

Reads one sentence a line, writes one line of space-separated ids a sentence, special tokens ([CLS],
[SEP]) included, after one header line. The program `finetune` calls it and caches its output.
"""

import argparse
import sys

import tokenizer_file
from whole_file import whole_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="the model's tokenizer.json")
    parser.add_argument("--input", required=True, help="UTF-8 text, one sentence a line")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--max-length", type=int, default=128, help="longer sentences are cut")
    parser.add_argument("--header", default="", help="first line of the output")
    options = parser.parse_args()

    tokenizer = tokenizer_file.load(options.tokenizer)
    # The file's own settings often pad everything to one length: batches are padded later.
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=options.max_length)
    # newline="\n": a lone carriage return or another Unicode line break is part of a sentence.
    with open(options.input, encoding="utf-8", errors="replace", newline="\n") as file:
        sentences = file.read().split("\n")[:-1]
    encodings = tokenizer.encode_batch(sentences)

    with whole_file(options.output) as file:
        file.write(options.header + "\n")
        for encoding in encodings:
            file.write(" ".join(map(str, encoding.ids)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
