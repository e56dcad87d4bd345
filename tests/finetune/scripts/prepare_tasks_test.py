#!/usr/bin/env python3
"""prepare_tasks.py and decode_tokens.py: what each published form becomes, and what happens to malformed records.

The tokenizer is a tiny one of single bytes with a few merges, made here, so that ids are turned back into exactly the
text they came from."""

import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True  # the scripts lie among the sources
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "support"))

import python_packages  # noqa: E402

python_packages.need(
    ["tokenizers"], os.environ.get("FINETUNE_PYTHON"), "name a Python that has it with FINETUNE_PYTHON"
)

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "examples/finetune/scripts"))

import decode_tokens  # noqa: E402
import prepare_tasks  # noqa: E402

TESTS = pathlib.Path(__file__).resolve().parents[2]
BEGIN, END, PAD = 0, 1, 2


def make_model(folder: pathlib.Path, encoder_decoder: bool) -> None:
    folder.mkdir()
    vocabulary = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġy", "~Ġ"]
    tokenizer = Tokenizer(
        models.BPE({token: number for number, token in enumerate(vocabulary)}, [("Ġ", "y"), ("~", "Ġ")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if encoder_decoder else "<s> $A", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    tokenizer.enable_padding(length=7)  # a file's own settings must not matter
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "t5" if encoder_decoder else "llama", "eos_token_id": END if encoder_decoder else [END, 9]}
    (folder / "config.json").write_text(json.dumps(config))


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "split": "val",
    "split_type": "indomain",
    "label": 3,
    "endings": [
        "is using wrap.",
        "is ripping level tiles off.",
        "holds a rubik's cube.",
        "starts pulling up roofing on a roof.",
    ],
}
ARC = {
    "id": "Mercury_1",
    "question": {
        "stem": "Which is a gas?",
        "choices": [{"text": "iron", "label": "A"}, {"text": "Helium (₂)", "label": "B"}],
    },
    "answerKey": "B",
}
BOOLQ = {"question": "is ice colder than steam", "title": "Ice", "answer": True, "passage": "Ice is cold."}
PIQA = {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Sing to it."}
WINOGRANDE = {
    "qID": "1-1",
    "sentence": "Ann gave Sue a hat because _ was cold .",
    "option1": "Ann",
    "option2": "Sue",
    "answer": "2",
}
GSM8K = {"question": "How many is 2000 + 1?", "answer": "2000 + 1 = <<2000+1=2001>>2001\n#### 2,001"}
ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Red."}
COMMONSENSE = {
    "instruction": "What is red?\n\nAnswer1: ice Answer2: blood Answer3: tea\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
SUPER_NI = {
    "Definition": ["Say the opposite"],
    "Positive Examples": [
        {"input": "hot", "output": "cold", "explanation": ""},
        {"input": "up!", "output": "down"},
        {"input": "in", "output": "out"},
    ],
    "Negative Examples": [],
    "Instances": [{"id": "a", "input": "wet", "output": ["dry", "arid "]}, {"input": "big", "output": ["small"]}],
}


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.path = pathlib.Path(cls.folder.name)
        make_model(cls.path / "decoder", False)
        make_model(cls.path / "t5", True)
        cls.tokenizer = Tokenizer.from_file(str(cls.path / "decoder/tokenizer.json"))
        cls.tokenizer.no_padding()
        cls.tokenizer.no_truncation()

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def run_main(self, main, *arguments: str) -> tuple[int | str | None, str]:
        """What it exits with, and all it says."""
        old, sys.argv = sys.argv, ["program", *arguments]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = main()
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv = old
        return code, said.getvalue()

    def prepare(self, form: str, content: str | bytes, *arguments: str, model: str = "decoder"):
        """(header, records, what it says) of a content."""
        source, out = self.path / "in.json", self.path / "out.jsonl"
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
        out.unlink(missing_ok=True)
        code, said = self.run_main(
            prepare_tasks.main, form, str(source), "--model", str(self.path / model), "--out", str(out), *arguments
        )
        if code is not None:
            self.assertFalse(out.exists(), "a refused file leaves no output")
            raise prepare_tasks.Malformed(str(code).replace(str(self.path) + "/", ""))
        header, *records = map(json.loads, out.read_text().splitlines())
        return header, records, said.replace(str(self.path) + "/", "")

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def refusal(self, form: str, content: str | bytes, *arguments: str) -> str:
        with self.assertRaises(prepare_tasks.Malformed) as refused:
            self.prepare(form, content, *arguments)
        return str(refused.exception)


class Choices(Case):
    def check(self, form: str, record: dict, prompt: str, choices: list[str], answer: int, *arguments: str):
        header, (made,), _ = self.prepare(form, lines(record), "--for", "evaluate", *arguments)
        self.assertEqual(
            header, {"format": prepare_tasks.FORMAT, "task": form, "kind": "choices", "encoder_decoder": False}
        )
        self.assertEqual([self.decode(ids) for ids in made["prompts"]], ["<s>" + prompt])
        self.assertEqual([self.decode(ids) for ids in made["choices"]], [" " + choice for choice in choices])
        self.assertEqual(made["characters"], [len(choice) for choice in choices])
        self.assertEqual(made["bytes"], [len(choice.encode()) for choice in choices])
        self.assertEqual(made["answer"], answer)
        _, (trained,), _ = self.prepare(form, lines(record), "--for", "train", *arguments)
        self.assertEqual(trained["prompt"], made["prompts"][0])
        self.assertEqual(trained["completion"], made["choices"][answer] + [END])

    def test_hellaswag_begins_with_the_activity_and_a_capital(self):
        self.check(
            "hellaswag", HELLASWAG, "Roof shingle removal: A man is sitting on a roof. He", HELLASWAG["endings"], 3
        )

    def test_hellaswag_loses_the_brackets_of_wikihow(self):
        record = {
            **HELLASWAG,
            "activity_label": "Health",
            "ctx_a": "How to rest [title] Lie down. [step] Do it. [step] Sleep.",
            "ctx_b": "",
            "endings": ["[substeps] Sleep.  Now.", "b"],
            "label": "0",
        }
        self.check("hellaswag", record, "Health: How to rest. Lie down. Do it. Sleep.", [" Sleep. Now.", "b"], 0)

    def test_arc_as_published_and_in_columns(self):
        texts = ["iron", "Helium (₂)"]
        self.check("arc", ARC, "Question: Which is a gas?\nAnswer:", texts, 1)
        columns = {"question": "Which is a gas?", "choices": {"text": texts, "label": ["1", "2"]}, "answerKey": "2"}
        self.check("arc", columns, "Question: Which is a gas?\nAnswer:", texts, 1)

    def test_openbookqa_is_its_stem(self):
        self.check("openbookqa", ARC, "Which is a gas?", ["iron", "Helium (₂)"], 1)
        columns = {"question_stem": "Gas?", "choices": {"text": ["iron", "air"], "label": ["A", "B"]}, "answerKey": "A"}
        self.check("openbookqa", columns, "Gas?", ["iron", "air"], 0)

    def test_boolq_as_published_and_in_superglue(self):
        prompt = "Ice is cold.\nQuestion: is ice colder than steam?\nAnswer:"
        self.check("boolq", BOOLQ, prompt, ["no", "yes"], 1)
        record = {"question": BOOLQ["question"], "passage": BOOLQ["passage"], "idx": 0}
        self.check("boolq", {**record, "label": False}, prompt, ["no", "yes"], 0)
        self.check("boolq", {**record, "label": 1}, prompt, ["no", "yes"], 1)

    def test_piqa_with_its_labels_beside_it(self):
        labels = self.path / "labels.lst"
        labels.write_text("1\n")
        self.check(
            "piqa", PIQA, "Question: Open a jar\nAnswer:", ["Turn the lid.", "Sing to it."], 1, "--labels", str(labels)
        )
        labels.write_text("1\n0\n")
        self.assertIn(
            "labels.lst: has 2 labels for the 1 records", self.refusal("piqa", lines(PIQA), "--labels", str(labels))
        )
        self.assertIn("in.json:1: has no 'label'; name the file", self.refusal("piqa", lines(PIQA)))

    def test_labels_stay_with_their_records_when_one_is_left_out(self):
        labels = self.path / "labels.lst"
        labels.write_text("1\n0\n1\n")
        _, made, _ = self.prepare(
            "piqa",
            lines(PIQA) + "broken\n\n" + lines(PIQA),
            "--labels",
            str(labels),
            "--for",
            "evaluate",
            "--malformed",
            "skip",
        )
        self.assertEqual([record["answer"] for record in made], [1, 1])

    COMMONSENSE_PROMPT = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        "\n                ### Instruction:"
        f"\n                {COMMONSENSE['instruction']}"
        "\n                "
        "\n                ### Response:"
    )

    def test_commonsense_asks_for_every_word_of_the_answer_format(self):
        header, (made,), _ = self.prepare("commonsense", lines(COMMONSENSE), "--for", "evaluate")
        self.assertEqual(header["kind"], "choices")
        self.assertEqual([self.decode(ids) for ids in made["prompts"]], ["<s>" + self.COMMONSENSE_PROMPT])
        self.assertEqual(
            [self.decode(ids) for ids in made["choices"]],
            [f"\n                the correct answer is answer{number}" for number in (1, 2, 3)],
        )
        self.assertEqual(made["answer"], 1)
        _, (trained,), _ = self.prepare("commonsense", lines(COMMONSENSE))
        self.assertEqual(trained["prompt"], made["prompts"][0])
        self.assertEqual(trained["completion"], made["choices"][1] + [END])
        self.assertEqual(trained["references"], ["the correct answer is answer2"])
        record = {"instruction": "Is it so? Answer format: true/false", "output": "it is false", "answer": "false"}
        _, (made,), _ = self.prepare("commonsense", json.dumps([record]), "--for", "evaluate")
        self.assertEqual([self.decode(ids).strip() for ids in made["choices"]], ["it is true", "it is false"])

    def test_winogrande_puts_the_options_into_the_prompt(self):
        _, (made,), _ = self.prepare("winogrande", lines(WINOGRANDE), "--for", "evaluate")
        self.assertEqual(
            [self.decode(ids) for ids in made["prompts"]],
            ["<s>Ann gave Sue a hat because Ann", "<s>Ann gave Sue a hat because Sue"],
        )
        self.assertEqual([self.decode(ids) for ids in made["choices"]], [" was cold ."] * 2)
        self.assertEqual(made["answer"], 1)
        _, (trained,), _ = self.prepare("winogrande", lines(WINOGRANDE))
        self.assertEqual(trained["prompt"], made["prompts"][1])


class Texts(Case):
    def check(self, made: dict, prompt: str, completion: str, references: list[str]):
        self.assertEqual(self.decode(made["prompt"]), "<s>" + prompt)
        self.assertEqual(self.decode(made["completion"]), completion + "</s>")
        self.assertEqual(made["references"], references)

    def test_gsm8k(self):
        _, (made,), _ = self.prepare("gsm8k", lines(GSM8K))
        self.check(made, "Question: How many is 2000 + 1?\nAnswer:", " " + GSM8K["answer"], [GSM8K["answer"]])

    def test_alpaca_with_and_without_input_as_list_and_as_lines(self):
        records = [ALPACA, {**ALPACA, "input": "of a tomato"}]
        for content in (json.dumps(records), lines(*records)):
            header, (without, with_input), _ = self.prepare("alpaca", content)
            self.assertEqual(header["kind"], "text")
            start = "Below is an instruction that describes a task"
            end = (
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nName a colour.\n\n{}### Response:"
            )
            self.check(without, start + ". " + end.format(""), "Red.", ["Red."])
            self.check(
                with_input,
                start
                + ", paired with an input that provides further context. "
                + end.format("### Input:\nof a tomato\n\n"),
                "Red.",
                ["Red."],
            )

    def test_super_ni_has_tk_instructs_layout(self):
        _, made, _ = self.prepare("super_ni", json.dumps(SUPER_NI))
        examples = (
            " Positive Example 1 -\nInput: hot.\n Output: cold.\n\n"
            " Positive Example 2 -\nInput: up!\n Output: down.\n\n"
        )
        end = "Now complete the following example -\nInput: {}.\nOutput:"
        self.check(made[0], "Definition: Say the opposite.\n\n" + examples + end.format("wet"), " dry", ["dry", "arid"])
        self.check(made[1], "Definition: Say the opposite.\n\n" + examples + end.format("big"), " small", ["small"])

    def test_super_ni_gives_up_examples_before_the_definition(self):
        whole = len(self.prepare("super_ni", json.dumps(SUPER_NI))[1][0]["prompt"])
        _, made, said = self.prepare("super_ni", json.dumps(SUPER_NI), "--max-length", str(whole))
        text = self.decode(made[0]["prompt"])
        self.assertTrue(text.startswith("<s>Definition: Say the opposite."))
        self.assertIn("Example 1", text)
        self.assertNotIn("Example 2", text)
        self.assertIn("2 records, 2 prompts shortened", said)


class Tokens(Case):
    def test_prompt_and_continuation_are_cut_where_the_prompt_ends(self):
        _, (made,), _ = self.prepare("boolq", lines(BOOLQ), "--for", "evaluate")
        merged = self.tokenizer.token_to_id("Ġy")
        self.assertEqual(made["choices"][1][0], merged, "the space belongs to the continuation's token")
        # '~' and ' ' are one token together, which belongs to the prompt, as in the harness.
        columns = {"question_stem": "Gas~", "choices": {"text": ["iron", "air"], "label": ["A", "B"]}, "answerKey": "A"}
        _, (made,), _ = self.prepare("openbookqa", lines(columns), "--for", "evaluate")
        self.assertEqual(self.decode(made["prompts"][0]), "<s>Gas~")
        self.assertEqual(self.decode(made["choices"][0]), "iron")

    def test_the_loss_of_the_text_takes_all_tokens_but_the_first(self):
        _, (usual,), _ = self.prepare("commonsense", lines(COMMONSENSE))
        _, (whole,), said = self.prepare("commonsense", lines(COMMONSENSE), "--loss", "text")
        tokens = usual["prompt"] + usual["completion"]
        self.assertEqual((whole["prompt"], whole["completion"]), ([BEGIN], tokens[1:]))
        self.assertEqual(whole["references"], usual["references"])
        self.assertIn(" 0 prompts shortened", said)
        self.assertIn("--loss text: is for", self.refusal("gsm8k", lines(GSM8K), "--loss", "text", "--for", "evaluate"))
        with self.assertRaisesRegex(prepare_tasks.Malformed, "--loss text: .*t5 is an encoder-decoder"):
            self.prepare("gsm8k", lines(GSM8K), "--loss", "text", model="t5")

    def test_a_part_is_spread_evenly_over_the_records(self):
        records = [{**ALPACA, "output": str(number)} for number in range(10)]
        _, made, said = self.prepare("alpaca", lines(*records), "--at-most", "4")
        self.assertEqual([record["references"] for record in made], [["0"], ["2"], ["5"], ["7"]])
        self.assertIn("out.jsonl: 4 of 10 records, 0 prompts shortened", said)
        for count in ("10", "11", "0"):
            _, made, said = self.prepare("alpaca", lines(*records), "--at-most", count)
            self.assertEqual(len(made), 10)
            self.assertIn("out.jsonl: 10 records, ", said)
        self.assertIn("--at-most -1: expected", self.refusal("alpaca", lines(*records), "--at-most", "-1"))

    def test_an_encoder_decoder_has_prompt_and_completion_apart(self):
        header, (made,), _ = self.prepare("gsm8k", lines(GSM8K), model="t5")
        self.assertTrue(header["encoder_decoder"])
        self.assertEqual(self.decode(made["prompt"]), "Question: How many is 2000 + 1?\nAnswer:</s>")
        self.assertEqual(self.decode(made["completion"]), " " + GSM8K["answer"] + "</s>")

    def test_a_long_prompt_loses_its_beginning_and_is_counted(self):
        _, (whole,), said = self.prepare("gsm8k", lines(GSM8K))
        self.assertIn(" 0 prompts shortened", said)
        length = len(whole["prompt"]) + len(whole["completion"])
        self.assertIn(" 0 prompts", self.prepare("gsm8k", lines(GSM8K), "--max-length", str(length))[2])
        _, (cut,), said = self.prepare("gsm8k", lines(GSM8K), "--max-length", str(length - 5))
        self.assertIn("1 records, 1 prompts shortened", said)
        self.assertEqual(cut["prompt"], [BEGIN, *whole["prompt"][6:]])
        self.assertEqual(cut["completion"], whole["completion"])

    def test_choices_keep_one_prompt_when_it_is_cut(self):
        record = {**PIQA, "sol1": "No.", "label": 0}
        _, (whole,), _ = self.prepare("piqa", lines(record), "--for", "evaluate")
        longest = max(map(len, whole["choices"]))
        _, (cut,), said = self.prepare("piqa", lines(record), "--for", "evaluate", "--max-length", str(longest + 4))
        self.assertEqual(cut["prompts"], [[BEGIN, *whole["prompts"][0][-3:]]])
        self.assertIn(" 1 prompts shortened", said)

    def test_an_encoder_decoders_source_and_target_have_a_length_each(self):
        _, (whole,), _ = self.prepare("gsm8k", lines(GSM8K), model="t5")
        most = max(len(whole["prompt"]), len(whole["completion"]))
        self.assertIn(" 0 prompts", self.prepare("gsm8k", lines(GSM8K), "--max-length", str(most), model="t5")[2])

    def test_a_completion_that_leaves_no_prompt_is_malformed(self):
        self.assertRegex(
            self.refusal("gsm8k", lines(GSM8K), "--max-length", "10"),
            r"in\.json:1: has a continuation of \d+ tokens, for which --max-length 10",
        )

    def test_the_end_token_is_the_configs_first_or_the_one_named(self):
        self.assertEqual(self.prepare("alpaca", lines(ALPACA))[1][0]["completion"][-1], END)
        self.assertEqual(self.prepare("alpaca", lines(ALPACA), "--end", "<pad>")[1][0]["completion"][-1], PAD)
        self.assertIn("--end nope: is no token", self.refusal("alpaca", lines(ALPACA), "--end", "nope"))

    def test_generation_configs_end_token_counts_first(self):
        config = {"model_type": "llama", "eos_token_id": [END, 9]}
        with tempfile.TemporaryDirectory() as name:
            for generation, end in [
                ({"eos_token_id": [PAD, END]}, PAD),
                ({"eos_token_id": PAD}, PAD),
                ({"eos_token_id": None}, END),
                ({}, END),
                ({"eos_token_id": []}, END),
            ]:
                (pathlib.Path(name) / "generation_config.json").write_text(json.dumps(generation))
                self.assertEqual(prepare_tasks.end_token(name, config), end, generation)
            (pathlib.Path(name) / "generation_config.json").write_text("[")
            with self.assertRaisesRegex(SystemExit, "generation_config.json: "):
                prepare_tasks.end_token(name, config)

    def test_what_config_leaves_out_has_transformers_defaults(self):
        golden = json.loads((TESTS / "finetune/models/golden/config_defaults.json").read_text())
        with tempfile.TemporaryDirectory() as name:
            for model_type, fields in golden.items():
                self.assertEqual(prepare_tasks.end_token(name, {"model_type": model_type}), fields.get("eos_token_id"))
            self.assertIsNone(prepare_tasks.end_token(name, {"model_type": "llama", "eos_token_id": None}))
            self.assertIsNone(prepare_tasks.end_token(name, {"model_type": "gpt2"}))

    def test_ids_become_text_again(self):
        ids, out = self.path / "ids", self.path / "texts"
        texts = ["a\nb\u2028", "", "é"]
        ids.write_text("".join(" ".join(map(str, self.tokenizer.encode(text).ids)) + "\n" for text in texts))
        code, _ = self.run_main(
            decode_tokens.main,
            "--tokenizer",
            str(self.path / "t5/tokenizer.json"),
            "--input",
            str(ids),
            "--output",
            str(out),
        )
        self.assertEqual(code, 0)
        self.assertEqual([json.loads(line) for line in out.read_text().split("\n")[:-1]], texts)


class MalformedRecords(Case):
    def test_every_form_names_what_is_missing_or_wrong(self):
        without = lambda record, name: {key: value for key, value in record.items() if key != name}
        cases = [
            ("hellaswag", without(HELLASWAG, "label"), "has no 'label'"),
            ("hellaswag", {**HELLASWAG, "label": 4}, "has 4 for 'label' where a number from 0 to 3"),
            ("hellaswag", {**HELLASWAG, "label": True}, "has true for 'label' where a number or a text is expected"),
            ("hellaswag", {**HELLASWAG, "endings": ["a", 3]}, "has something else than a text in 'endings'"),
            ("hellaswag", {**HELLASWAG, "endings": []}, "has nothing in 'endings'"),
            ("hellaswag", without(HELLASWAG, "ctx_b"), "has no text 'ctx_b'"),
            (
                "hellaswag",
                {**HELLASWAG, "endings": ["a", "[x]"], "label": 0},
                "has nothing but brackets in one of the 'endings'",
            ),
            ("arc", {**ARC, "answerKey": "E"}, "has the answer 'E' and the labels ['A', 'B'] for 2 choices"),
            ("arc", {**ARC, "question": 7}, "has 7 for 'question' where a text is expected"),
            ("openbookqa", without(ARC, "answerKey"), "has no 'answerKey'"),
            ("boolq", {**BOOLQ, "answer": "yes"}, "where true or false or a number is expected"),
            ("boolq", {**BOOLQ, "passage": " "}, "has nothing in 'passage'"),
            ("piqa", {**PIQA, "label": 2}, "has 2 for 'label'"),
            ("winogrande", {**WINOGRANDE, "sentence": "no blank"}, "has a 'sentence' without '_'"),
            ("winogrande", {**WINOGRANDE, "answer": ""}, "has nothing in 'answer'"),
            ("winogrande", {**WINOGRANDE, "answer": "3"}, 'where "1" or "2" is expected'),
            ("commonsense", without(COMMONSENSE, "answer"), "has no 'answer'"),
            (
                "commonsense",
                {**COMMONSENSE, "answer": "answer4"},
                "is none of its instruction's answer1, answer2, answer3",
            ),
            ("commonsense", {**COMMONSENSE, "output": "answer1"}, "does not end with its answer 'answer2'"),
            ("commonsense", {**COMMONSENSE, "instruction": "Which?"}, "does not end with 'Answer format: '"),
            ("commonsense", {**COMMONSENSE, "input": "x"}, "has an 'input'"),
            ("gsm8k", {**GSM8K, "answer": "2001"}, "without '#### ' and a number"),
            ("alpaca", without(ALPACA, "output"), "has no 'output'"),
            ("alpaca", {**ALPACA, "input": ["a"]}, "has [\"a\"] for 'input'"),
            ("alpaca", {**ALPACA, "output": "\ud800"}, "has half a character in 'output'"),
            ("gsm8k", 7, "is no JSON object"),
        ]
        good = {
            "hellaswag": HELLASWAG,
            "arc": ARC,
            "openbookqa": ARC,
            "boolq": BOOLQ,
            "piqa": {**PIQA, "label": 0},
            "winogrande": WINOGRANDE,
            "commonsense": COMMONSENSE,
            "gsm8k": GSM8K,
            "alpaca": ALPACA,
        }
        for form, record, expected in cases:
            with self.subTest(form=form, expected=expected):
                content = lines(good[form], record, good[form])
                message = self.refusal(form, content, "--for", "evaluate")
                self.assertIn("in.json:2: ", message)
                self.assertIn(expected, message)
                _, made, said = self.prepare(form, content, "--for", "evaluate", "--malformed", "skip")
                self.assertEqual(len(made), 2)
                self.assertIn(expected, said)
                self.assertIn("1 records left out", said)

    def test_a_line_that_is_no_json_or_no_utf8(self):
        for broken in (b'{"question": "a', b'{"question": "\xff"}', b"[" * 100000):
            message = self.refusal("gsm8k", lines(GSM8K).encode() + b"\n" + broken + b"\n")
            self.assertIn("in.json:3: is no JSON", message)

    def test_a_list_names_the_index(self):
        self.assertIn("in.json[1]: has no 'instruction'", self.refusal("alpaca", json.dumps([ALPACA, {}])))

    def test_an_instance_of_super_ni_is_named(self):
        record = {**SUPER_NI, "Instances": [*SUPER_NI["Instances"], {"input": "x", "output": []}, 3]}
        self.assertIn("in.json: Instances[2]: has nothing in 'output'", self.refusal("super_ni", json.dumps(record)))
        _, made, said = self.prepare("super_ni", json.dumps(record), "--malformed", "skip")
        self.assertEqual(len(made), 2)
        self.assertIn("Instances[3]: is no JSON object", said)

    def test_a_file_of_another_form_is_refused_even_when_skipping(self):
        self.assertIn("in.json: is no task", self.refusal("super_ni", "{}", "--malformed", "skip"))
        self.assertIn("in.json: is no JSON", self.refusal("alpaca", "[{]", "--malformed", "skip"))
        self.assertIn("no record of the form", self.refusal("gsm8k", lines(ARC), "--malformed", "skip"))

    def test_a_byte_order_mark_and_crlf_do_not_matter(self):
        content = b"\xef\xbb\xbf" + lines(GSM8K, GSM8K).replace("\n", "\r\n").encode()
        self.assertEqual(len(self.prepare("gsm8k", content)[1]), 2)


if __name__ == "__main__":
    unittest.main()
