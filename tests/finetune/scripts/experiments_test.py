#!/usr/bin/env python3
"""The parts of reproduce.py that run nothing: rates, answers in texts, the table."""

import math
import pathlib
import sys
import unittest

sys.dont_write_bytecode = True  # the scripts lie among the sources
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "examples/finetune/scripts"))

from experiments import answers, rates, recipes, report  # noqa: E402


class Rates(unittest.TestCase):
    def search(self, grid: str, most_added: int, loss) -> tuple[dict[str, float], list[str]]:
        """What is found, and the rates in the order in which they were tried."""
        tried = []

        def measure(rate: str) -> float:
            tried.append(rate)
            self.assertLess(len(tried), 20, "the search finds no end")
            return loss(float(rate))

        return rates.search(grid.split(","), most_added, measure), tried

    def test_the_next_rate_is_of_the_series(self):
        for rate, up, down in [
            ("1e-3", 2e-3, 5e-4),
            ("0.0005", 1e-3, 2e-4),
            ("2e-4", 5e-4, 1e-4),
            ("3e-2", 5e-2, 2e-2),
            ("5", 10, 2),
        ]:
            self.assertEqual(float(rates.next_rate(rate, upwards=True)), up, rate)
            self.assertEqual(float(rates.next_rate(rate, upwards=False)), down, rate)

    def test_a_grid_grows_until_the_best_rate_is_inside(self):
        distance = lambda best: lambda rate: abs(math.log(rate / best))
        losses, tried = self.search("2e-4,5e-4,1e-3", 9, distance(5e-3))
        self.assertEqual(tried, ["2e-4", "5e-4", "1e-3", "2e-3", "5e-3", "1e-2"])
        self.assertEqual(rates.best(losses), "5e-3")
        self.assertFalse(rates.at_end(losses))
        losses, tried = self.search("1e-3,2e-4,5e-4", 9, distance(1e-4))
        self.assertEqual(tried, ["2e-4", "5e-4", "1e-3", "1e-4", "5e-5"])
        self.assertEqual(list(losses), ["5e-5", "1e-4", "2e-4", "5e-4", "1e-3"])
        self.assertEqual(self.search("2e-4,5e-4,1e-3", 9, distance(5e-4))[1], ["2e-4", "5e-4", "1e-3"])

    def test_it_grows_no_further_than_is_allowed_and_not_where_it_is_short(self):
        losses, tried = self.search("2e-4,5e-4,1e-3", 2, lambda rate: -rate)
        self.assertEqual(tried[3:], ["2e-3", "5e-3"])
        self.assertTrue(rates.at_end(losses))
        self.assertEqual(self.search("2e-4,5e-4", 2, lambda rate: -rate)[1], ["2e-4", "5e-4"])

    def test_what_diverges_sends_the_search_downwards(self):
        losses, tried = self.search("2e-4,5e-4,1e-3", 4, lambda rate: math.inf if rate > 6e-5 else 1 - rate)
        self.assertEqual(tried[3:], ["1e-4", "5e-5", "2e-5"])
        self.assertEqual(rates.best(losses), "5e-5")


class Contenders(unittest.TestCase):
    def test_the_papers_rule_is_not_bounded(self):
        bound = lambda contender: contender.words()[contender.words().index("--max-relative-change") + 1]
        for name, contender in {**recipes.OFFICIAL_CONTENDERS, **recipes.PAPER_CONTENDERS, **recipes.RITE_CODE}.items():
            if contender.optimizer == "rite":
                self.assertEqual(bound(contender), "0.3" if name == "rite-ours" else "0", name)
            else:
                self.assertNotIn("--max-relative-change", contender.words(), name)


class Answers(unittest.TestCase):
    def test_the_first_word_that_is_an_answer_counts(self):
        number, truth = "the correct answer is answer2", "the correct answer is false"
        for text, right, expected in [
            ("the correct answer is answer2", number, True),
            ("\n   the correct answer is answer3, not answer2", number, False),
            ("answer2 answer3", number, True),
            ("answer7 answer2", number, True),  # there is no answer7
            ("answer5 answer2", number, False),  # some questions have five
            ("Answer2", number, False),
            ("2", number, False),
            ("", number, False),
            ("solution2", number, False),
            ("it is false, not true", truth, True),
            ("untrue", truth, False),
            ("not false", truth, True),
            ("solution1", "the correct answer is solution1", True),
            ("ending4.", "the correct answer is ending4", True),
            ("option1", "the correct answer is option2", False),
        ]:
            self.assertEqual(answers.is_right(text, right), expected, (text, right))
        with self.assertRaisesRegex(ValueError, "'yes' ends with no word"):
            answers.first_answer("yes", "yes")


class Table(unittest.TestCase):
    def report(self, **changes) -> dict:
        scores = [
            {"boolq": {"acc": 0.5, "first_answer": 0.25}, "ARC-Easy": {"acc": 0.75, "first_answer": 0.25}},
            {"boolq": {"acc": 0.7, "first_answer": 0.25}, "ARC-Easy": {"acc": 0.75, "first_answer": 0.25}},
        ]
        result = {"task": "commonsense", "optimizer": "adamw", "rate": "1e-3", "rates": {"1e-3": 1.25}, "tests": scores}
        part = {
            "train": {"taken": 1500, "of": 17754},
            "held_out": 120,
            "steps": 30,
            "batch": 64,
            "epochs": 1.28,
            "max_length": 512,
            "loss": "text",
            "tests": {"boolq": {"taken": 100, "of": 3270}, "ARC-Easy": {"taken": 2376, "of": 2376}},
        }
        report = {"experiment": "official", "model": "gemma-2b", "title": "Gemma 2B", "extent": {"commonsense": part}}
        return {**report, "results": [result], **changes}

    def table(self, **changes) -> str:
        tasks = {"commonsense": recipes.commonsense(["boolq", "ARC-Easy"], pathlib.Path("nowhere"))}
        return report.table(self.report(**changes), tasks)

    def test_every_test_has_a_column_and_the_mean_is_over_them(self):
        lines = self.table(model="smollm2-135m").splitlines()
        self.assertIn("| acc | adamw | 1e-3 | 60.00 ± 14.14 | 75.00 ± 0.00 | 67.50 ± 7.07 | 1.2500 |", lines)
        self.assertIn("| first_answer | adamw | 1e-3 | 25.00 ± 0.00 | 25.00 ± 0.00 | 25.00 ± 0.00 | 1.2500 |", lines)
        self.assertIn(
            "- commonsense: trained on 1,500 of 17,754 records (120 more held out), 30 steps of 64 (epochs: "
            "1.28), texts of at most 512 tokens, loss of the text; tests: boolq 100 of 3,270, ARC-Easy 2,376",
            lines,
        )

    def test_a_rate_without_a_loss_diverged(self):
        (result,) = self.report()["results"]
        lines = self.table(model="", results=[{**result, "rates": {"1e-3": None}}]).splitlines()
        self.assertIn("| acc | adamw | 1e-3 | 60.00 ± 14.14 | 75.00 ± 0.00 | 67.50 ± 7.07 | diverged |", lines)

    def test_the_authors_numbers_stand_beside_gemmas_alone_and_beside_written_answers(self):
        lines = [line for line in self.table().splitlines() if "published" in line]
        self.assertEqual(
            lines,
            [
                "| first_answer | LoRA-RITE, published |  | 62.91 | 78.45 | 70.68 |  |",
                "| first_answer | Adam, published |  | 62.20 | 76.60 | 69.40 |  |",
            ],
        )
        self.assertNotIn("published", self.table(model="smollm2-135m"))
        self.assertNotIn("published", self.table(model=""))

    def test_the_authors_numbers_have_their_means(self):
        means = {name: sum(values.values()) / len(values) for name, values in recipes.PUBLISHED.items()}
        self.assertEqual({name: round(mean, 2) for name, mean in means.items()}, {"LoRA-RITE": 68.27, "Adam": 66.19})


if __name__ == "__main__":
    unittest.main()
