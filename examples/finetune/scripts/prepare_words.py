#!/usr/bin/env python3
"""Makes two tasks for language models of WordNet, whose senses of English words were written and sorted by hand.

    prepare_words.py /usr/share/wordnet words
    prepare_tasks.py arc words/kinds.train.jsonl --model MODEL --out kinds.train.jsonl
    prepare_tasks.py super_ni words/instructions.train/*.json --model MODEL --out instructions.train.jsonl

kinds.*.jsonl ask with four choices what kind of thing a word stands for in a sentence: In "the oceans are teeming with
life", what is "life"? The kinds are the 39 subjects by which WordNet's authors divided nouns and verbs. Form: arc.

instructions.*/ hold four tasks with instructions: define a word that stands in a sentence, name a word of the same
meaning, one of the opposite meaning, one of a more general meaning. What WordNet has beside the first answer is there
as a further reference. Form: super_ni.

The folder is that of Debian's package wordnet-base: data.noun and its like, cntlist.rev. Which words are for training,
validation and test is decided by a hash of the word, so the files are the same everywhere; no word, definition or
sentence that is asked about stands in two of them, nor is one asked about in two instructions.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import re
import sys
from collections import Counter

from whole_file import whole_file

PARTS = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}  # and their numbers in cntlist.rev

# The numbers of lexnames(5WN), less those with hardly an example and noun.Tops, which holds the most general nouns.
NOUNS = {
    4: "an act",
    5: "an animal",
    6: "a made thing",
    7: "a quality",
    8: "a body part",
    9: "a thought",
    10: "a message",
    11: "an event",
    12: "a feeling",
    13: "a food",
    14: "a group",
    15: "a place",
    17: "a natural thing",
    18: "a person",
    19: "a phenomenon",
    20: "a plant",
    21: "a possession",
    22: "a process",
    23: "a quantity",
    24: "a relation",
    25: "a shape",
    26: "a state",
    27: "a substance",
    28: "a time",
}
VERBS = {
    29: "caring for the body",
    30: "changing",
    31: "thinking",
    32: "telling",
    33: "competing",
    34: "consuming",
    35: "touching",
    36: "making",
    37: "feeling",
    38: "moving",
    39: "perceiving",
    40: "owning",
    41: "acting among people",
    42: "being",
    43: "weather",
}

INSTRUCTIONS = {
    "define": "Say what the word in quotation marks means in the sentence",
    "same": "Give a word that means the same as this one",
    "opposite": "Give a word that means the opposite of this one",
    "broader": "Give a word for what this is a kind of",
}
PLACES = {"train": 75, "validation": 10, "test": 15}  # and their shares in a hundred


@dataclasses.dataclass
class Sense:
    """A synset: words that mean the same, their definition, sentences, and other synsets by the kind of relation."""

    key: tuple[str, str]  # part of speech and offset
    subject: int
    words: list[str]
    common: list[str]  # those of the words that were met in this sense in tagged texts
    definition: str
    sentences: list[str]
    relations: list[tuple[str, tuple[str, str], int, int]]  # symbol, other synset, own word and the other's (0 = all)


def number(*parts: str) -> int:
    """The same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:6], "big")


def read_counts(path: pathlib.Path) -> dict[str, int]:
    counts = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, count = line.split()
        counts[key] = int(count)
    return counts


def read_sense(line: str, part: str, counts: dict[str, int]) -> Sense:
    """A line of data.noun: offset, subject, type, number of words, the words, number of relations, the relations,
    gloss; see wndb(5WN)."""
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    words, common = [], []
    for at in range(4, 4 + 2 * count, 2):
        word = re.sub(r"\(\w+\)$", "", fields[at])  # where an adjective stands
        key = f"{word.lower()}%{PARTS[part]}:{int(fields[1]):02d}:{int(fields[at + 1], 16):02d}::"
        words.append(word.replace("_", " "))
        if counts.get(key, 0) > 0:
            common.append(words[-1])
    relations = []
    at = 4 + 2 * count
    for begin in range(at + 1, at + 1 + 4 * int(fields[at]), 4):
        symbol, offset, kind, places = fields[begin : begin + 4]
        other = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}[kind]
        relations.append((symbol, (other, offset), int(places[:2], 16), int(places[2:], 16)))
    gloss = gloss.strip()
    definition = re.split(r'[;:]? *"', gloss)[0].strip(" ;")
    sentences = re.findall(r'"([^"]+)"', gloss)
    return Sense((part, fields[0]), int(fields[1]), words, common, definition, sentences, relations)


def read_wordnet(folder: pathlib.Path) -> dict[tuple[str, str], Sense]:
    """All senses by their keys, in an order of chance that is always the same."""
    senses = {}
    try:
        counts = read_counts(folder / "cntlist.rev")
        for part in PARTS:
            for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
                if not line.startswith("  "):  # the licence
                    sense = read_sense(line, part, counts)
                    senses[sense.key] = sense
    except OSError as error:
        sys.exit(f"{error.filename}: cannot be read ({error.strerror}); those of Debian's wordnet-base are expected")
    except (ValueError, IndexError, KeyError) as error:
        sys.exit(f"{folder}: is no WordNet database ({error!r}); the files of Debian's wordnet-base are expected")
    return dict(sorted(senses.items(), key=lambda item: number("sense", *item[0])))


def place(word: str) -> str:
    """Which part of the data a word belongs to."""
    at = number("place", word.lower()) % 100
    return "test" if at < PLACES["test"] else "validation" if at < 100 - PLACES["train"] else "train"


def sentence_with(sense: Sense, words: list[str]) -> tuple[str, str] | None:
    """One of the words as it is written there, and the first sentence that has it so."""
    for sentence in sense.sentences:
        found = set(re.findall(r"[A-Za-z][a-z'-]*", sentence))
        for word in words:
            if word in found:
                return word, sentence
    return None


def make_kinds(senses: dict) -> dict[str, list[dict]]:
    records: dict[str, list[dict]] = {name: [] for name in PLACES}
    sentences = set()
    for sense in senses.values():
        kinds = NOUNS if sense.subject in NOUNS else VERBS if sense.subject in VERBS else None
        found = sentence_with(sense, sense.words)
        if kinds is None or found is None or found[1] in sentences:
            continue
        word, sentence = found
        sentences.add(sentence)
        right = kinds[sense.subject]
        by_chance = lambda kind, key=sense.key: number("choice", *key, kind)
        choices = [*sorted(set(kinds.values()) - {right}, key=by_chance)[:3], right]
        choices.sort(key=lambda kind, key=sense.key: number("order", *key, kind))
        labels = [chr(ord("A") + at) for at in range(len(choices))]
        question = f'In "{sentence}", what is "{word}"{"" if kinds is NOUNS else " about"}?'
        records[place(word)].append(
            {
                "question": question,
                "choices": {"text": choices, "label": labels},
                "answerKey": labels[choices.index(right)],
            }
        )
    return records


def related(senses: dict, sense: Sense, symbol: str) -> list[str]:
    """Words of the other synsets: of a relation between two words that word, else all."""
    words = []
    for found, other, _, theirs in sense.relations:
        if found == symbol and other in senses:
            there = senses[other].words
            words += there[theirs - 1 : theirs] if theirs else there
    return [word for at, word in enumerate(words) if word not in words[:at]]


def instances(senses: dict, sense: Sense) -> dict[str, tuple[str, dict]]:
    """What can be asked about a sense: the word asked about and the record, by instruction."""
    asked = {}
    if not sense.common:
        return asked
    word = sense.common[0]
    hint = f"{word} ({sense.definition})"
    if (found := sentence_with(sense, sense.common)) is not None:
        quoted = re.sub(rf"\b{re.escape(found[0])}\b", f'"{found[0]}"', found[1], count=1)
        asked["define"] = found[0], {"input": quoted, "output": [sense.definition]}
    if others := [other for other in sense.common + sense.words if other != word]:
        asked["same"] = word, {"input": hint, "output": list(dict.fromkeys(others))}
    if others := related(senses, sense, "!"):
        own = next(own for symbol, _, own, _ in sense.relations if symbol == "!")
        of = sense.words[own - 1] if own else word
        asked["opposite"] = of, {"input": of, "output": others}
    if sense.key[0] == "noun" and (others := related(senses, sense, "@")):
        asked["broader"] = word, {"input": hint, "output": others}
    return asked


def make_instructions(senses: dict, most: int) -> dict[str, dict[str, list[dict]]]:
    found: dict[str, dict[str, list[dict]]] = {name: {task: [] for task in INSTRUCTIONS} for name in PLACES}
    counts: Counter = Counter()
    seen = set()  # antonyms are asked about in one direction only
    definitions = set()  # a few are those of two senses
    for sense in senses.values():
        if sense.definition in definitions:
            continue
        definitions.add(sense.definition)
        # The rarest first, so that the tasks are of like size.
        for task, (word, record) in sorted(
            instances(senses, sense).items(), key=lambda item: ("opposite", "define", "broader", "same").index(item[0])
        ):
            where = place(word)
            pair = frozenset([record["input"], record["output"][0]]) if task == "opposite" else None
            if counts[where, task] >= most * PLACES[where] // 100 or pair in seen:
                continue
            if pair is not None:
                seen.add(pair)
            counts[where, task] += 1
            found[where][task].append({"id": f"{task}-{'-'.join(sense.key)}", **record})
            break
    return found


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=pathlib.Path, help="folder with data.noun, data.verb, …, cntlist.rev")
    parser.add_argument("out", type=pathlib.Path, help="folder for the tasks")
    parser.add_argument(
        "--most",
        type=int,
        default=2500,
        metavar="N",
        help="records of an instruction, of all parts together (default %(default)s)",
    )
    options = parser.parse_args()

    senses = read_wordnet(options.wordnet)
    for name, records in make_kinds(senses).items():
        write(options.out / f"kinds.{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        print(f"{options.out / f'kinds.{name}.jsonl'}: {len(records)} questions")
    for name, tasks in make_instructions(senses, options.most).items():
        for task, records in tasks.items():
            content = {"Definition": [INSTRUCTIONS[task]], "Positive Examples": [], "Instances": records}
            write(options.out / f"instructions.{name}" / f"{task}.json", json.dumps(content, indent=1) + "\n")
        counts = ", ".join(f"{task} {len(records)}" for task, records in tasks.items())
        print(f"{options.out / f'instructions.{name}'}: {counts}")


if __name__ == "__main__":
    main()
