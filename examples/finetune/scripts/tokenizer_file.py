"""Loads a tokenizer.json for the scripts beside it."""

import sys

MISSING_PACKAGE, BAD_TOKENIZER = 1, 3  # exit codes, which finetune knows


def load(path: str):
    """The tokenizer; where there is none, says why and ends the process."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        print(f"{sys.executable}: the package 'tokenizers' is missing ({error})", file=sys.stderr)
        sys.exit(MISSING_PACKAGE)
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the package raises nothing narrower
        print(f"{path}: {error}", file=sys.stderr)
        sys.exit(BAD_TOKENIZER)
