#!/usr/bin/env python3
"""prepare_words.py: what becomes of WordNet's lines, and that nothing is asked in two parts of the data."""

import contextlib
import io
import json
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "examples/finetune/scripts"))

sys.dont_write_bytecode = True  # the script lies among the sources

import prepare_words  # noqa: E402

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
NOUNS = [
    '00000001 26 n 02 life 0 living 0 001 @ 00000002 n 0000 | the state of being alive; "he risked his life"; "oh"  ',
    "00000002 26 n 02 natural_state 0 condition 1 000 | how a thing is  ",
    '00000003 13 n 01 soup 0 000 | (cooking) liquid food; usually hot; "we had soup"  ',
    '00000004 03 n 01 entity 0 000 | whatever there is; "an entity of its own"  ',
    '00000005 05 n 01 Dog 0 000 | an animal; "dogs bark"  ',
]
VERBS = [
    '00000001 38 v 02 walk 0 go_on_foot 0 001 @ 00000009 v 0000 02 + 02 00 + 22 00 | use one\'s feet; "we walk home"  ',
]
ADJECTIVES = [
    '00000001 00 a 02 good 0 fine(a) 0 001 ! 00000002 a 0101 | as it should be; "a good meal"  ',
    "00000002 00 a 01 bad 0 001 ! 00000001 a 0101 | not as it should be  ",
    "00000003 00 s 01 huge 0 001 & 00000001 a 0000 | very large  ",
]
COUNTS = {
    "life%1:26:00::": 3,
    "living%1:26:00::": 1,
    "soup%1:13:00::": 2,
    "walk%2:38:00::": 9,
    "good%3:00:00::": 5,
    "bad%3:00:00::": 4,
}


def make_wordnet(folder: pathlib.Path, nouns=NOUNS, counts=COUNTS) -> None:
    for part, lines in {"noun": nouns, "verb": VERBS, "adj": ADJECTIVES, "adv": []}.items():
        (folder / f"data.{part}").write_text(LICENCE + "".join(line + "\n" for line in lines))
    (folder / "cntlist.rev").write_text("".join(f"{key} 1 {count}\n" for key, count in counts.items()))


class PrepareWords(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name)

    def run_script(self, out="out", *more) -> dict[str, str]:
        """The files it writes, by name."""
        arguments, sys.argv = sys.argv, ["prepare_words.py", str(self.path), str(self.path / out), *more]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                prepare_words.main()
        finally:
            sys.argv = arguments
        root = self.path / out
        return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}

    def kinds(self, files) -> dict[str, tuple]:
        """Word → question, right answer, choices."""
        found = {}
        for name in ("train", "validation", "test"):
            for line in files[f"kinds.{name}.jsonl"].splitlines():
                record = json.loads(line)
                choices = dict(zip(record["choices"]["label"], record["choices"]["text"]))
                word = record["question"].split('"')[-2]
                found[word] = record["question"], choices.pop(record["answerKey"]), sorted(choices.values())
        return found

    def instructions(self, files) -> dict[str, list[tuple]]:
        found = {task: [] for task in prepare_words.INSTRUCTIONS}
        for name, text in files.items():
            if name.startswith("instructions."):
                found[pathlib.Path(name).stem] += [(it["input"], it["output"]) for it in json.loads(text)["Instances"]]
        return found

    def test_kinds_are_asked_of_words_that_stand_in_a_sentence(self):
        make_wordnet(self.path)
        kinds = self.kinds(self.run_script())
        # The most general nouns have no kind, and "Dog" stands in no sentence as it is written.
        self.assertEqual(set(kinds), {"life", "soup", "walk"})
        self.assertEqual(kinds["life"][:2], ('In "he risked his life", what is "life"?', "a state"))
        self.assertEqual(kinds["soup"][1], "a food")
        self.assertEqual(kinds["walk"][:2], ('In "we walk home", what is "walk" about?', "moving"))
        self.assertTrue(set(kinds["walk"][2]) <= set(prepare_words.VERBS.values()) - {"moving"})
        self.assertEqual(len(set(kinds["life"][2])), 3)

    def test_a_sense_is_asked_about_in_one_instruction(self):
        make_wordnet(self.path)
        found = self.instructions(self.run_script())
        asked = sorted((task, *record) for task, records in found.items() for record in records)
        opposite = [record for record in asked if record[0] == "opposite"]
        self.assertIn(opposite, ([("opposite", "good", ["bad"])], [("opposite", "bad", ["good"])]))
        self.assertIn(("define", 'he risked his "life"', ["the state of being alive"]), asked)
        self.assertIn(("define", 'we had "soup"', ["(cooking) liquid food; usually hot"]), asked)
        self.assertIn(("define", 'we "walk" home', ["use one's feet"]), asked)
        inputs = [record[1] for record in asked]
        self.assertEqual(len(inputs), len(set(inputs)))

    def test_what_a_sense_is_asked_depends_on_what_it_has(self):
        # Without a sentence it is asked for its kind; without relations for its other words, the common ones first.
        make_wordnet(
            self.path,
            [
                NOUNS[0].split('; "')[0],
                NOUNS[1],
                "00000006 06 n 03 box 0 case 0 chest 0 000 | a made thing to put things into",
            ],
            {**COUNTS, "chest%1:06:00::": 1, "box%1:06:00::": 2},
        )
        found = self.instructions(self.run_script())
        self.assertEqual(found["broader"], [("life (the state of being alive)", ["natural state", "condition"])])
        self.assertEqual(found["same"], [("box (a made thing to put things into)", ["chest", "case"])])

    def test_words_without_a_count_are_not_asked_about(self):
        make_wordnet(self.path, counts={"other%1:26:00::": 1})
        self.assertEqual(sum(map(len, self.instructions(self.run_script()).values())), 0)

    def test_the_parts_have_no_word_sentence_or_definition_in_common(self):
        nouns = [f'{n:08d} 26 n 01 w{n // 3}x 0 000 | meaning {n}; "here w{n // 3}x stands {n}"' for n in range(600)]
        make_wordnet(
            self.path,
            [
                noun.replace(f"w{n // 3}x", "w" + "abcdefghij"[n // 3 % 10] * (n // 30 + 1))
                for n, noun in enumerate(nouns)
            ],
            {"w" + letter * count + "%1:26:00::": 1 for letter in "abcdefghij" for count in range(1, 21)},
        )
        files = self.run_script("out", "--most", "1000")
        parts = {}
        for name in ("train", "validation", "test"):
            kinds = [json.loads(line)["question"].split('"') for line in files[f"kinds.{name}.jsonl"].splitlines()]
            tasks = json.loads(files[f"instructions.{name}/define.json"])["Instances"]
            parts[name] = (
                {kind[3] for kind in kinds} | {task["input"].split('"')[1] for task in tasks},
                {kind[1] for kind in kinds},
                {task["output"][0] for task in tasks},
            )
            self.assertTrue(all(parts[name]), name)
        for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
            for ours, theirs in zip(parts[one], parts[other]):
                self.assertEqual(ours & theirs, set())
        self.assertEqual(sum(len(part[1]) for part in parts.values()), 600 + 1)  # and the verb
        self.assertAlmostEqual(len(parts["test"][0]) / 200, 0.15, delta=0.08)

    def test_a_sentence_or_definition_of_two_senses_is_asked_about_once(self):
        make_wordnet(
            self.path,
            [f'0000000{n} 26 n 01 {word} 0 000 | a thing; "ice and snow"' for n, word in enumerate(("ice", "snow"))],
            {"ice%1:26:00::": 1, "snow%1:26:00::": 1},
        )
        files = self.run_script()
        self.assertEqual(len(set(self.kinds(files)) & {"ice", "snow"}), 1)
        self.assertEqual(len(self.instructions(files)["define"]), 1)

    def test_the_files_are_the_same_every_time(self):
        make_wordnet(self.path)
        self.assertEqual(self.run_script("first"), self.run_script("second"))

    def test_most_bounds_every_instruction(self):
        make_wordnet(self.path)
        self.assertEqual(sum(map(len, self.instructions(self.run_script("out", "--most", "0")).values())), 0)

    def test_other_files_are_refused(self):
        with self.assertRaisesRegex(SystemExit, "cntlist.rev: cannot be read .*wordnet-base"):
            self.run_script()
        make_wordnet(self.path, ["00000001 26 n"])
        with self.assertRaisesRegex(SystemExit, "is no WordNet database"):
            self.run_script()


if __name__ == "__main__":
    unittest.main()
