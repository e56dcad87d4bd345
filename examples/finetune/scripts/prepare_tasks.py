#!/usr/bin/env python3
"""Makes a tokenised task file, which the C++ side reads, of records in a published form.

    prepare_tasks.py hellaswag hellaswag_val.jsonl --model MODEL --out val.jsonl --for evaluate

Forms: super_ni and alpaca (instructions), hellaswag, arc, openbookqa, boolq, piqa, winogrande (choices), gsm8k (a
number to find). docs/tasks.md has the prompt of each and what the file looks like. With `--for train` a question
with choices becomes its prompt and the right choice.

A prompt and its continuation are encoded together and cut where the encoded prompt ends. A prompt that is too long
loses its beginning; how many did is reported. A malformed record ends the program, or is left out with `--malformed
skip`.
"""

import argparse
import dataclasses
import json
import os
import re
import string
import sys
from collections.abc import Iterator
from typing import Callable

from whole_file import whole_file

FORMAT = "finetune-tasks 1"


class Malformed(Exception):
    """What is wrong with one record; the place is added by who knows it."""


@dataclasses.dataclass
class Text:
    """A prompt and how it goes on."""

    prompts: list[str]  # the first that fits is taken, else the last is cut
    completion: str  # with the space before it, if there is one
    references: list[str]


@dataclasses.dataclass
class Choices:
    """A question with the answers to choose from."""

    prompts: list[str]  # one for all choices, or one for each
    choices: list[str]  # without the space before them
    answer: int

    def as_text(self) -> Text:
        right = self.choices[self.answer]
        return Text([self.prompts[self.answer % len(self.prompts)]], " " + right, [right])


# --- Reading fields

KINDS = {str: "a text", list: "a list", dict: "an object", bool: "true or false", int: "a number"}


def whole(text: str, name: str) -> str:
    if re.search("[\ud800-\udfff]", text):
        raise Malformed(f"has half a character in '{name}' (a surrogate without its other half)")
    return text


def field(record: dict, name: str, *kinds: type):
    """The field, of one of the given kinds (text by default) and not empty."""
    kinds = kinds or (str,)
    if name not in record:
        raise Malformed(f"has no '{name}'")
    value = record[name]
    # bool is an int to Python, not to us
    if not any(type(value) is kind for kind in kinds):
        raise Malformed(
            f"has {json.dumps(value)[:60]} for '{name}' where {' or '.join(KINDS[kind] for kind in kinds)} is expected"
        )
    if isinstance(value, (str, list)) and not (value.strip() if isinstance(value, str) else value):
        raise Malformed(f"has nothing in '{name}'")
    return whole(value, name) if isinstance(value, str) else value


def texts(record: dict, name: str) -> list[str]:
    """A list of texts; one text is a list of one."""
    value = field(record, name, str, list)
    value = [value] if isinstance(value, str) else value
    if not all(isinstance(text, str) and text.strip() for text in value):
        raise Malformed(f"has something else than a text in '{name}'")
    return [whole(text, name) for text in value]


def index(value, count: int, name: str) -> int:
    """An index that may be written as a number or as a text."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or int(text) >= count:
        raise Malformed(f"has {json.dumps(value)} for '{name}' where a number from 0 to {count - 1} is expected")
    return int(text)


# --- The forms: a record, and what it becomes


def super_ni(record: dict, options: argparse.Namespace) -> Text:
    """Tk-Instruct's layout; `record` is an instance together with its task's definition and examples."""

    def sentence(text: str) -> str:
        text = text.strip()
        return text if text[-1:] in string.punctuation else text + "."

    head = f"Definition: {sentence(texts(record, 'Definition')[0])}\n\n"
    shown = []
    for number, example in enumerate(record.get("Positive Examples", [])[: options.positive_examples], 1):
        if not isinstance(example, dict):
            raise Malformed("belongs to a task whose 'Positive Examples' are no objects")
        shown.append(
            f" Positive Example {number} -\nInput: {sentence(field(example, 'input'))}\n"
            f" Output: {sentence(field(example, 'output'))}\n\n"
        )
    tail = f"Now complete the following example -\nInput: {sentence(field(record, 'input'))}\nOutput: "
    outputs = [text.strip() for text in texts(record, "output")]
    return Text([head + "".join(shown[:count]) + tail for count in range(len(shown), -1, -1)], outputs[0], outputs)


def alpaca(record: dict, options: argparse.Namespace) -> Text:
    instruction, output = field(record, "instruction"), field(record, "output")
    context = record.get("input") or ""
    if not isinstance(context, str):
        field(record, "input")  # says what is wrong
    if whole(context, "input"):
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:"
        )
    else:
        prompt = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:"
        )
    return Text([prompt], output, [output])


def hellaswag(record: dict, options: argparse.Namespace) -> Choices:
    def clean(text: str) -> str:
        # Brackets are left over from WikiHow's headings.
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    if not isinstance(record.get("ctx_b"), str):
        raise Malformed("has no text 'ctx_b'")  # empty is usual
    context = field(record, "ctx_a") + " " + whole(record["ctx_b"], "ctx_b").capitalize()
    endings = [clean(ending) for ending in texts(record, "endings")]
    if not all(ending.strip() for ending in endings):
        raise Malformed("has nothing but brackets in one of the 'endings'")
    return Choices(
        [clean(field(record, "activity_label") + ": " + context)],
        endings,
        index(field(record, "label", int, str), len(endings), "label"),
    )


def labelled_choices(record: dict, stem: str) -> tuple[str, list[str], int]:
    """Question, choices and answer of AI2's files (question: {stem, choices: [{text, label}]}) and of their copies in
    columns (stem, choices: {text: [], label: []})."""
    if isinstance(record.get("question"), dict):
        question = field(record["question"], "stem")
        pairs = field(record["question"], "choices", list)
        if not all(isinstance(pair, dict) for pair in pairs):
            raise Malformed("has 'choices' that are no objects")
        choices = [field(pair, "text") for pair in pairs]
        labels = [field(pair, "label") for pair in pairs]
    else:
        question = field(record, stem)
        columns = field(record, "choices", dict)
        choices, labels = texts(columns, "text"), texts(columns, "label")
    key = field(record, "answerKey").strip()
    if len(choices) != len(labels) or key not in labels:
        raise Malformed(f"has the answer '{key}' and the labels {labels} for {len(choices)} choices")
    return question, choices, labels.index(key)


def arc(record: dict, options: argparse.Namespace) -> Choices:
    question, choices, answer = labelled_choices(record, "question")
    return Choices([f"Question: {question}\nAnswer:"], choices, answer)


def openbookqa(record: dict, options: argparse.Namespace) -> Choices:
    question, choices, answer = labelled_choices(record, "question_stem")
    return Choices([question], choices, answer)


def boolq(record: dict, options: argparse.Namespace) -> Choices:
    # "answer" in the original, "label" in SuperGLUE's copy
    answer = field(record, "answer" if "answer" in record else "label", bool, int)
    answer = int(answer) if isinstance(answer, bool) else index(answer, 2, "label")
    return Choices(
        [f"{field(record, 'passage')}\nQuestion: {field(record, 'question')}?\nAnswer:"], ["no", "yes"], answer
    )


def piqa(record: dict, options: argparse.Namespace) -> Choices:
    if "label" not in record:
        raise Malformed("has no 'label'; name the file of labels with --labels")
    return Choices(
        [f"Question: {field(record, 'goal')}\nAnswer:"],
        [field(record, "sol1"), field(record, "sol2")],
        index(record["label"], 2, "label"),
    )


def winogrande(record: dict, options: argparse.Namespace) -> Choices:
    """Both choices go on alike: the one that makes the rest of the sentence more probable is chosen."""
    before, blank, after = field(record, "sentence").partition("_")
    if not blank or not after.strip():
        raise Malformed("has a 'sentence' without '_' and a text after it")
    answer = field(record, "answer")
    if answer not in ("1", "2"):
        raise Malformed(f'has {json.dumps(answer)} for \'answer\' where "1" or "2" is expected')
    return Choices(
        [before + field(record, "option1"), before + field(record, "option2")], [after.strip()] * 2, int(answer) - 1
    )


def gsm8k(record: dict, options: argparse.Namespace) -> Text:
    answer = field(record, "answer")
    if not re.search(r"#### -?[0-9.,]+", answer):
        raise Malformed("has an 'answer' without '#### ' and a number")
    return Text([f"Question: {field(record, 'question')}\nAnswer:"], " " + answer, [answer])


FORMS: dict[str, Callable] = {
    form.__name__: form for form in (super_ni, alpaca, hellaswag, arc, openbookqa, boolq, piqa, winogrande, gsm8k)
}

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

    def text(self, example: Text) -> dict:
        for prompt in example.prompts:
            tokens, completion = self.split(prompt, example.completion)
            if not completion:
                raise Malformed("has a completion of no tokens")
            completion.append(self.end)
            room = self.room(len(completion))
            if len(tokens) <= room:
                break
        self.shortened += prompt is not example.prompts[0] or len(tokens) > room
        return {"prompt": self.cut(tokens, room), "completion": completion, "references": example.references}

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

    encoder = Encoder(options.model, options.max_length, options.end)
    kind, lines, skipped = "text", [], 0
    for path in options.input:
        for place, record in read_super_ni(path) if options.form == "super_ni" else read_records(path, options.labels):
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
                    lines.append(encoder.text(example.as_text() if isinstance(example, Choices) else example))
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
    print(f"{options.out}: {len(lines)} records, {encoder.shortened} prompts shortened, {skipped} records left out")


if __name__ == "__main__":
    main()
