#!/usr/bin/env python3
"""Makes a tokenised task file, which the C++ side reads, of records in a published form.

    prepare_tasks.py hellaswag hellaswag_val.jsonl --model MODEL --out val.jsonl --for evaluate

Forms: super_ni and alpaca (instructions), hellaswag, arc, openbookqa, boolq, piqa, winogrande, commonsense (choices),
gsm8k (a number to find). docs/tasks.md has the prompt of each and what the file looks like. With `--for train` a
question with choices becomes its prompt and the right choice.

A prompt and its continuation are encoded together and cut where the encoded prompt ends. A prompt that is too long
loses its beginning; how many did is reported. A malformed record ends the program, or is left out with `--malformed
skip`.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator

from spread import spread
from task_forms import FORMS, Choices, Malformed, Text, texts
from whole_file import whole_file

FORMAT = "finetune-tasks 1"


# --- Reading files: places and records, where a record may be a Malformed


def read_text(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        sys.exit(f"{path}: cannot be read ({error.strerror})")


def parse(content: bytes):
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"is no JSON ({error})") from None


def read_records(path: str, labels: str | None) -> Iterator[tuple[str, dict | Malformed]]:
    content = read_text(path)
    if content.lstrip()[:1] == b"[":
        try:
            records = [(f"{path}[{number}]", record) for number, record in enumerate(parse(content))]
        except Malformed as error:
            sys.exit(f"{path}: {error}")
    else:
        records = []
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                try:
                    records.append((f"{path}:{number}", parse(line)))
                except Malformed as error:
                    records.append((f"{path}:{number}", error))
    if labels is not None:
        lines = read_text(labels).decode("utf-8", errors="replace").split()
        if len(lines) != len(records):
            sys.exit(f"{labels}: has {len(lines)} labels for the {len(records)} records of {path}")
        for (_, record), label in zip(records, lines):
            if isinstance(record, dict):
                record["label"] = label
    yield from records


def read_super_ni(path: str) -> Iterator[tuple[str, dict | Malformed]]:
    """The instances of a task, each with the task's own fields."""
    try:
        task = parse(read_text(path))
        if not isinstance(task, dict) or not isinstance(task.get("Instances"), list):
            raise Malformed("is no task: an object with 'Definition', 'Positive Examples' and 'Instances' is expected")
        shared = {"Definition": texts(task, "Definition"), "Positive Examples": task.get("Positive Examples", [])}
        if not isinstance(shared["Positive Examples"], list):
            raise Malformed("has no list in 'Positive Examples'")
    except Malformed as error:
        sys.exit(f"{path}: {error}")
    for number, instance in enumerate(task["Instances"]):
        yield f"{path}: Instances[{number}]", {**instance, **shared} if isinstance(instance, dict) else instance


def read(form: str, paths: list[str], labels: str | None = None) -> list[tuple[str, dict | Malformed]]:
    """All records of the files, one file after the other."""
    each = read_super_ni if form == "super_ni" else lambda path: read_records(path, labels)
    return [found for path in paths for found in each(path)]


# --- Tokens


# What transformers' classes take where config.json says nothing: as in models/config.cpp.
DEFAULT_ENDS = {"llama": 2, "gemma": 1, "gemma2": 1, "t5": 1, "mt5": 1}


def end_token(model: str, config: dict) -> int | None:
    """The first of the tokens at which the model stops writing: generation_config.json's, and config.json's where there
    is no such file or it names none."""
    generation = {}
    path = os.path.join(model, "generation_config.json")
    if os.path.exists(path):
        try:
            generation = parse(read_text(path))
            if not isinstance(generation, dict):
                raise Malformed("is no JSON object")
        except Malformed as error:
            sys.exit(f"{path}: {error}")
    default = DEFAULT_ENDS.get(config.get("model_type"))
    for ends in (generation.get("eos_token_id"), config.get("eos_token_id", default)):
        first = ends[0] if isinstance(ends, list) and ends else ends
        if type(first) is int:
            return first
    return None


class Encoder:
    """Texts as the model sees them. `shortened` counts the records whose prompt lost something."""

    def __init__(self, model: str, max_length: int, end: str | None):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            sys.exit(f"{sys.executable}: the package 'tokenizers' is missing ({error})")
        path = os.path.join(model, "tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the package raises nothing narrower
            sys.exit(f"{path}: {error}")
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        path = os.path.join(model, "config.json")
        try:
            config = parse(read_text(path))
            if not isinstance(config, dict):
                raise Malformed("is no JSON object")
        except Malformed as error:
            sys.exit(f"{path}: {error}")
        self.encoder_decoder = bool(config.get("is_encoder_decoder")) or config.get("model_type") in ("t5", "mt5")
        self.max_length = max_length
        self.shortened = 0
        # What the tokenizer puts around a text: <s> in front for a decoder, </s> after it for T5.
        whole = self.tokenizer.encode("a")
        special = whole.special_tokens_mask
        first = special.index(0) if 0 in special else len(special)
        last = len(special) - special[::-1].index(0) if 0 in special else len(special)
        self.begin, self.after = whole.ids[:first], whole.ids[last:]
        if end is not None:
            self.end = self.tokenizer.token_to_id(end)
            if self.end is None:
                sys.exit(f"--end {end}: is no token of {model}")
        else:
            self.end = end_token(model, config)
            if self.end is None:
                sys.exit(f"{path}: has no eos_token_id; name the token that ends a text with --end")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def split(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both without special tokens. Spaces at the prompt's end go to the continuation, where tokens have them."""
        stripped = prompt.rstrip()
        continuation = prompt[len(stripped) :] + continuation
        tokens = self.ids(stripped)
        if self.encoder_decoder:
            return tokens, self.ids(continuation)
        return tokens, self.ids(stripped + continuation)[len(tokens) :]

    def surrounded(self, prompt: list[int]) -> list[int]:
        return self.begin + prompt + (self.after if self.encoder_decoder else [])

    def room(self, longest: int) -> int:
        """How many of a prompt's own tokens fit beside a continuation."""
        room = self.max_length - len(self.surrounded([])) - (0 if self.encoder_decoder else longest)
        if longest > self.max_length or room < 1:
            raise Malformed(
                f"has a continuation of {longest} tokens, for which --max-length {self.max_length} leaves no prompt"
            )
        return room

    def cut(self, prompt: list[int], room: int) -> list[int]:
        return self.surrounded(prompt[-room:])

    def text(self, example: Text, loss: str) -> dict:
        for prompt in example.prompts:
            tokens, completion = self.split(prompt, example.completion)
            if not completion:
                raise Malformed("has a completion of no tokens")
            completion.append(self.end)
            room = self.room(len(completion))
            if len(tokens) <= room:
                break
        self.shortened += prompt is not example.prompts[0] or len(tokens) > room
        shown = self.cut(tokens, room)
        if loss == "text":  # a first token has nothing before it that could foretell it
            shown, completion = shown[:1], shown[1:] + completion
        return {"prompt": shown, "completion": completion, "references": example.references}

    def choices(self, example: Choices) -> dict:
        count = len(example.choices)
        shared = len(example.prompts) == 1
        pairs = [
            self.split(example.prompts[0 if shared else choice], " " + example.choices[choice])
            for choice in range(count)
        ]
        if not all(completion for _, completion in pairs):
            raise Malformed("has a choice of no tokens")
        # One room for all: the choices are compared, so they have to be asked the same.
        room = self.room(max(len(completion) for _, completion in pairs))
        self.shortened += any(len(prompt) > room for prompt, _ in pairs)
        prompts = [self.cut(prompt, room) for prompt, _ in pairs]
        return {
            "prompts": prompts[:1] if shared else prompts,
            "choices": [completion for _, completion in pairs],
            "characters": [len(choice) for choice in example.choices],
            "bytes": [len(choice.encode("utf-8")) for choice in example.choices],
            "answer": example.answer,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("input", nargs="+", help="JSON or JSON lines, as published")
    parser.add_argument("--model", required=True, help="folder with tokenizer.json and config.json")
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("train", "evaluate"),
        default="train",
        help="evaluate keeps all choices (default %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=1024,
        help="most tokens of prompt and completion together, of each for an encoder-decoder (default %(default)s)",
    )
    parser.add_argument(
        "--loss",
        choices=("completion", "text"),
        default="completion",
        help="what is trained on: the completion, or the prompt too, all but its first token (default %(default)s)",
    )
    parser.add_argument(
        "--at-most", type=int, default=0, help="take so many records, spread evenly over all files; 0 = all of them"
    )
    parser.add_argument("--malformed", choices=("skip", "refuse"), default="refuse", help="(default %(default)s)")
    parser.add_argument("--labels", help="piqa's file of labels, one a line")
    parser.add_argument(
        "--positive-examples",
        type=int,
        default=2,
        help="super_ni: how many are shown, as far as they fit (default %(default)s)",
    )
    parser.add_argument(
        "--end",
        help="token that ends a completion (default: the first eos_token_id of generation_config.json, "
        "or of config.json where that names none)",
    )
    options = parser.parse_args()
    if options.labels is not None and len(options.input) != 1:
        sys.exit("--labels belongs to one file; give that alone")

    if options.at_most < 0:
        sys.exit(f"--at-most {options.at_most}: expected at least 0")
    if options.loss == "text" and options.purpose == "evaluate":
        sys.exit("--loss text: is for what is trained on; leave it out, or take --for train")

    encoder = Encoder(options.model, options.max_length, options.end)
    if options.loss == "text" and encoder.encoder_decoder:
        sys.exit(f"--loss text: {options.model} is an encoder-decoder, whose loss is the completion's; leave it out")
    kind, lines, skipped = "text", [], 0
    records = read(options.form, options.input, options.labels)
    total = len(records)
    if options.at_most:
        records = [records[index] for index in spread(options.at_most, total)]
    for place, record in records:
        try:
            if isinstance(record, Malformed):
                raise record
            if not isinstance(record, dict):
                raise Malformed("is no JSON object")
            example = FORMS[options.form](record, options)
            if isinstance(example, Choices) and options.purpose == "evaluate":
                kind = "choices"
                lines.append(encoder.choices(example))
            else:
                text = example.as_text() if isinstance(example, Choices) else example
                lines.append(encoder.text(text, options.loss))
        except Malformed as error:
            if options.malformed == "refuse":
                sys.exit(f"{place}: {error}; correct it, or leave such records out with --malformed skip")
            print(f"{place}: {error}; left out", file=sys.stderr)
            skipped += 1
    if not lines:
        sys.exit(f"{', '.join(options.input)}: no record of the form {options.form}")

    header = {"format": FORMAT, "task": options.form, "kind": kind, "encoder_decoder": encoder.encoder_decoder}
    with whole_file(options.out) as file:
        for line in [header, *lines]:
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
    of = f" of {total}" if len(records) < total else ""
    print(f"{options.out}: {len(lines)}{of} records, {encoder.shortened} prompts shortened, {skipped} records left out")


if __name__ == "__main__":
    main()
