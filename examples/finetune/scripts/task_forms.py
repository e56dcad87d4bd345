"""The published forms of records that prepare_tasks.py knows, and what each becomes: a text, or choices."""

import argparse
import dataclasses
import json
import re
import string
from typing import Callable


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


TASK_ALONE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


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
        prompt = f"{TASK_ALONE}\n\n### Instruction:\n{instruction}\n\n### Response:"
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


def commonsense(record: dict, options: argparse.Namespace) -> Choices:
    """LLM-Adapters' records of eight data sets: every answer is a word, which the instruction lists. The layout, its
    blanks included, is what LLM-Adapters and the authors of LoRA-RITE train on."""
    instruction, output, answer = field(record, "instruction"), field(record, "output"), field(record, "answer")
    if record.get("input"):
        raise Malformed("has an 'input', for which the prompt has no place")
    listed = re.search(r"Answer format: (\S+)\s*$", instruction)
    if listed is None:
        raise Malformed("has an 'instruction' that does not end with 'Answer format: ' and words with / between")
    words = listed[1].split("/")
    if answer not in words:
        raise Malformed(f"has the answer '{answer}', which is none of its instruction's {', '.join(words)}")
    if not output.endswith(answer):
        raise Malformed(f"has an 'output' that does not end with its answer '{answer}'")
    line = "\n" + 16 * " "
    prompt = TASK_ALONE + "  \n" + line.join(["", "### Instruction:", instruction, "", "### Response:", ""])
    said = output.removesuffix(answer)
    # The last of the blanks is the space that stands before a choice.
    return Choices([prompt.removesuffix(" ")], [said + word for word in words], words.index(answer))


def gsm8k(record: dict, options: argparse.Namespace) -> Text:
    answer = field(record, "answer")
    if not re.search(r"#### -?[0-9.,]+", answer):
        raise Malformed("has an 'answer' without '#### ' and a number")
    return Text([f"Question: {field(record, 'question')}\nAnswer:"], " " + answer, [answer])


FORMS: dict[str, Callable] = {
    form.__name__: form
    for form in (super_ni, alpaca, hellaswag, arc, openbookqa, boolq, piqa, winogrande, commonsense, gsm8k)
}
