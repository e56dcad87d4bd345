#!/usr/bin/env python3
"""scripts/reproduce from end to end, with tiny models of random weights: reproduce_test.py FINETUNE

Gemma chooses among rates on questions with choices, mT5 follows instructions and writes, a Llama learns all questions
of the official recipe at once and answers them in both ways; all go on where they were.
LORA_RITE_TEST_DEVICE=cuda runs them on a GPU.
"""

import contextlib
import io
import json
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True  # the scripts lie among the sources
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "support"))

import python_packages  # noqa: E402

python_packages.need(
    ["tokenizers"], os.environ.get("FINETUNE_PYTHON"), "name a Python that has it with FINETUNE_PYTHON"
)

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "examples/finetune/scripts"))

import reproduce  # noqa: E402
from experiments import commands as running  # noqa: E402
from experiments import recipes  # noqa: E402

FINETUNE = ""
VOCABULARY = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    *"abcdefghijklmnopqrstuvwxyz0123456789 .:#?,'\n",
]  # 48: models have as many or more


def make_model(folder: pathlib.Path, golden: str) -> None:
    folder.mkdir()
    source = ROOT / "tests/finetune/models/golden" / golden
    shutil.copy(source / "model.safetensors", folder)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    tokenizer = Tokenizer(models.WordLevel({token: at for at, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_arc(data: pathlib.Path) -> None:
    for name, count in (("Train", 24), ("Dev", 6), ("Test", 6)):
        records = [
            {
                "question": {
                    "stem": f"what is {n} and 1?",
                    "choices": [{"text": str(n + more), "label": label} for more, label in enumerate("ABCD")],
                },
                "answerKey": "B",
            }
            for n in range(count)
        ]
        write(data / f"arc/ARC-Challenge-{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def make_super_ni(data: pathlib.Path) -> None:
    for part, tasks in (("train", ("one", "two")), ("test", ("three",))):
        write(data / f"natural-instructions/splits/default/{part}_tasks.txt", "\n".join(tasks) + "\n")
        for task in tasks:
            content = {
                "Definition": ["repeat it"],
                "Positive Examples": [],
                "Instances": [{"input": f"{task} {n}", "output": [f"{task} {n}"]} for n in range(3)],
            }
            write(data / f"natural-instructions/tasks/{task}.json", json.dumps(content))


def make_commonsense(data: pathlib.Path) -> None:
    """Records in LLM-Adapters' format: questions about numbers, with words to answer."""
    words = {"boolq": ("true", "false"), "openbookqa": tuple(f"answer{n}" for n in (1, 2, 3, 4))}
    for name, answers in words.items():
        for part, count in (("train", 20), ("test", 7)):
            records = [
                {
                    "instruction": f"is {n} so? answer format: x\n\nAnswer format: {'/'.join(answers)}",
                    "input": "",
                    "output": f"the correct answer is {answers[n % len(answers)]}",
                    "answer": answers[n % len(answers)],
                }
                for n in range(count)
            ]
            write(data / f"commonsense/{name}.{part}.json", json.dumps(records))


class Reproduce(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = pathlib.Path(folder.name)
        # Curves are nothing to be tested here, and matplotlib takes longer than all the rest.
        write(self.path / "without/matplotlib.py", "raise ImportError('not in this test')\n")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(self.path / "without")
        self.addCleanup(
            lambda: os.environ.pop("PYTHONPATH") if before is None else os.environ.__setitem__("PYTHONPATH", before)
        )

    def run_script(self, setting: str, *more: str) -> tuple[str, list[list[str]]]:
        """What it prints, and the commands it gave."""
        commands = []
        run = running.Commands.run

        def listed(self, *words):
            commands.append([str(word) for word in words])
            run(self, *words)

        arguments = sys.argv
        sys.argv = [
            "reproduce",
            setting,
            "--model",
            str(self.path / "model"),
            "--data",
            str(self.path / "data"),
            "--out",
            str(self.path / "out"),
            "--finetune",
            FINETUNE,
            "--python",
            sys.executable,
            "--device",
            os.environ.get("LORA_RITE_TEST_DEVICE", "cpu"),
            *more,
        ]
        running.Commands.run = listed
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                reproduce.main()
        finally:
            running.Commands.run = run
            sys.argv = arguments
        return out.getvalue(), commands

    def results(self) -> list[dict]:
        return json.loads((self.path / "out/results.json").read_text())["results"]

    def records(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.path / "out/data" / name).read_text().splitlines()[1:]]

    def test_gemma_chooses_a_rate_and_goes_on(self):
        make_model(self.path / "model", "gemma")
        make_arc(self.path / "data")
        arguments = (
            "gemma-2b",
            "--any-model",
            "--tasks",
            "arc_challenge",
            "--optimizers",
            "rite,adam",
            "--rates",
            "rite=1e-9,3e-2",
            "--rates",
            "adam=1e-2",
            "--seeds",
            "2",
            "--steps",
            "4",
            "--batch",
            "8",
            "--micro-batch",
            "4",
            "--rank",
            "2",
            "--threads",
            "1",
            "--dtype",
            "float32",
        )
        text, commands = self.run_script(*arguments)
        trained = [command for command in commands if command[1] == "train"]
        self.assertEqual(len(trained), 5)  # 2 rates and another seed, 1 rate and another seed
        # At a rate of nearly nothing nothing is learned.
        self.assertEqual(
            [command[command.index("--lr") + 1] for command in trained], ["1e-9", "3e-2", "3e-2", "1e-2", "1e-2"]
        )
        self.assertIn("--max-grad-norm", trained[-1])
        self.assertNotIn("--max-grad-norm", trained[0])
        self.assertIn("arc_challenge: a run takes about", text)
        self.assertIn("base weights", text)

        results = self.results()
        self.assertEqual(
            [(result["optimizer"], result["rate"]) for result in results], [("rite", "3e-2"), ("adam", "1e-2")]
        )
        for result in results:
            self.assertEqual([test["arc_challenge"]["examples"] for test in result["tests"]], [6, 6])
        table = (self.path / "out/table.md").read_text()
        self.assertIn(table, text)
        self.assertIn("model, with the settings of Gemma 2B; scores", table)
        for start in ("| arc_challenge | acc_norm | rite | 3e-2 | ", "| arc_challenge | acc | adam | 1e-2 | "):
            self.assertIn(start, table)

        # Once more: nothing is left to be done. Then one run was not at its end.
        again, commands = self.run_script(*arguments)
        self.assertEqual(commands, [])
        self.assertIn(table, again)
        metrics = self.path / "out/runs/arc_challenge/adam/1e-2/seed-1/metrics.jsonl"
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
        (metrics.parent / "choices.json").unlink()
        again, commands = self.run_script(*arguments)
        self.assertEqual([command[1:3] for command in commands], [["train", "--resume"], ["eval", "--model"]])
        self.assertEqual((self.path / "out/table.md").read_text(), table)

    def test_mt5_follows_instructions(self):
        make_model(self.path / "model", "mt5")
        make_super_ni(self.path / "data")
        text, commands = self.run_script(
            "mt5-xxl",
            "--any-model",
            "--tasks",
            "super_ni",
            "--optimizers",
            "rite",
            "--rates",
            "rite=1e-2",
            "--seeds",
            "1",
            "--steps",
            "3",
            "--batch",
            "2",
            "--rank",
            "2",
            "--generate",
            "4",
            "--threads",
            "1",
        )
        self.assertEqual(len(commands), 4)  # two files, one run, one measurement
        self.assertEqual(self.results()[0]["tests"][0]["super_ni"]["examples"], 3)
        self.assertIn("| super_ni | rouge_l | rite | 1e-2 | ", text)
        records = {
            part: (self.path / f"out/data/super_ni/{part}.jsonl").read_text().splitlines()[1:]
            for part in ("train", "validation", "super_ni.texts")
        }
        self.assertEqual([len(lines) for lines in records.values()], [3, 3, 3])
        self.assertEqual(set(records["train"]) & set(records["validation"]), set())

    OFFICIAL = (
        "official",
        "--any-model",
        "--optimizers",
        "rite-ours,adamw",
        "--rates",
        "rite-ours=1e-4,2e-4,3e-4",
        "--rates",
        "adamw=1e-2",
        "--seeds",
        "2",
        "--records",
        "16",
        "--held-out",
        "4",
        "--test-records",
        "5",
        "--steps",
        "7",
        "--max-length",
        "100",
        "--batch",
        "4",
        "--micro-batch",
        "4",
        "--rank",
        "2",
        "--generate",
        "3",
        "--threads",
        "1",
    )

    def test_the_official_recipe_trains_once_and_asks_every_task_in_both_ways(self):
        make_model(self.path / "model", "llama")
        make_commonsense(self.path / "data")
        text, commands = self.run_script(*self.OFFICIAL, "--widen", "2")
        trained = [command for command in commands if command[1] == "train"]
        rates = [command[command.index("--lr") + 1] for command in trained]
        # At rates of nearly nothing the greatest does best: two more are tried, which are allowed, then a second seed.
        self.assertEqual(rates, ["1e-4", "2e-4", "3e-4", "5e-4", "1e-3", "1e-3", "1e-2", "1e-2"])
        for option, value in {
            "--optimizer": "rite",
            "--max-relative-change": "0.3",
            "--dtype": "float32",
            "--warmup": "1",  # of 7 steps
            "--evaluate-every": "1",
            "--alpha": "2",
            "--dropout": "0.05",
            "--schedule": "linear",
            "--target-modules": "q_proj,k_proj,v_proj,up_proj,down_proj",
        }.items():
            self.assertEqual(trained[0][trained[0].index(option) + 1], value, option)
        self.assertNotIn("--max-grad-norm", trained[0])
        self.assertEqual(trained[-1][trained[-1].index("--max-grad-norm") + 1], "1")

        # Both tasks in one file, all of each text to be learned; four held out, as was asked.
        learned, held_out = self.records("commonsense/train.jsonl"), self.records("commonsense/validation.jsonl")
        self.assertEqual((len(learned), len(held_out)), (12, 4))
        kinds = {record["references"][0].rstrip("1234") for record in learned}
        self.assertEqual(
            kinds, {"the correct answer is true", "the correct answer is false", "the correct answer is answer"}
        )
        self.assertEqual({len(record["prompt"]) for record in learned + held_out}, {1})
        self.assertEqual(
            [len(record["choices"]) for record in self.records("commonsense/openbookqa.choices.jsonl")], [4] * 5
        )
        asked = self.records("commonsense/boolq.texts.jsonl")[0]
        self.assertLess(len(asked["completion"]), len(asked["prompt"]))

        results = self.results()
        self.assertEqual([result["optimizer"] for result in results], ["rite-ours", "adamw"])
        self.assertEqual(list(results[0]["rates"]), ["1e-4", "2e-4", "3e-4", "5e-4", "1e-3"])
        for result in results:
            for seed in result["tests"]:
                self.assertEqual(list(seed), ["boolq", "openbookqa"])
                for scores in seed.values():
                    self.assertEqual(scores["examples"], 5)
                    self.assertLessEqual({"acc", "loss", "first_answer"}, set(scores))
        extent = json.loads((self.path / "out/results.json").read_text())["extent"]["commonsense"]
        self.assertEqual(extent["train"], {"taken": 12, "of": 36})
        self.assertEqual(extent["tests"]["openbookqa"], {"taken": 5, "of": 7})
        table = (self.path / "out/table.md").read_text()
        self.assertIn("trained on 12 of 36 records (4 more held out), 7 steps of 4 (epochs: 2.33)", table)
        self.assertIn("loss of the text; tests: boolq 5 of 7, openbookqa 5 of 7", table)
        self.assertIn("| score | optimizer | rate | boolq | openbookqa | mean | validation loss |", table)
        self.assertIn("| acc | rite-ours | 1e-3 | ", table)
        self.assertIn("| first_answer | adamw | 1e-2 | ", table)
        self.assertNotIn("published", table)  # this is no Gemma 2B
        self.assertIn("the best rate 1e-3 is an end of its grid", text)

        # What the model wrote counts, not what the program said of it.
        folder = self.path / "out/runs/commonsense/adamw/1e-2/seed-0"
        written = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
        data = str(self.path / "out/data/commonsense/boolq.texts.jsonl")
        for line in written:
            line["text"] = "\n  it is true, not false" if line["data"] == data else "answer9"
        (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
        _, commands = self.run_script(*self.OFFICIAL, "--widen", "2")
        self.assertEqual(commands, [])
        right = [record["references"][0].endswith("true") for record in self.records("commonsense/boolq.texts.jsonl")]
        seed = self.results()[1]["tests"][0]
        self.assertEqual(seed["boolq"]["first_answer"], sum(right) / 5)
        self.assertEqual(seed["openbookqa"]["first_answer"], 0)

    def test_what_the_program_does_not_know_is_told_before_it_trains(self):
        make_model(self.path / "model", "llama")
        make_commonsense(self.path / "data")
        with self.assertRaisesRegex(SystemExit, "--optimizer nothing"):
            self.run_script(*self.OFFICIAL, "--optimizers", "adamw,nothing", "--rates", "nothing=1e-3")
        self.assertFalse((self.path / "out/runs").exists())

    def test_results_of_other_settings_are_not_mixed(self):
        make_model(self.path / "model", "llama")
        make_commonsense(self.path / "data")
        one = (*self.OFFICIAL, "--optimizers", "adamw", "--seeds", "1")
        self.run_script(*one)
        before = (self.path / "out/table.md").read_text()
        with self.assertRaisesRegex(SystemExit, "of commonsense with other settings: steps was 7, is 3; give those"):
            self.run_script(*one, "--steps", "3")
        with self.assertRaisesRegex(SystemExit, "other settings: train was .*boolq.train.json.*tests was"):
            self.run_script(*one, "--tasks", "openbookqa")
        self.assertEqual((self.path / "out/table.md").read_text(), before)

    def test_the_authors_mixture_is_trained_on_where_it_is(self):
        make_model(self.path / "model", "llama")
        make_commonsense(self.path / "data")
        command = next(line for line in self.dry_run("official", "--any-model") if "prepare_tasks" in line)
        self.assertIn("boolq.train.json", command)
        self.assertIn("--loss text", command)
        shutil.copy(
            self.path / "data/commonsense/boolq.train.json", self.path / "data/commonsense/commonsense_15k.json"
        )
        lines = self.dry_run("official", "--any-model", "--tasks", "openbookqa")
        self.assertIn("commonsense_15k.json", lines[0])
        self.assertNotIn(".train.json", lines[0])
        self.assertIn("openbookqa.test.json", lines[1])
        self.assertFalse(any("boolq" in line for line in lines))
        trained = [line for line in lines if line.split()[1] == "train"]
        rates = sum(len(recipes.OFFICIAL_CONTENDERS[name].rates.split(",")) for name in recipes.OFFICIAL_CONTENDERS)
        self.assertEqual(len(trained), rates + 2 * len(recipes.OFFICIAL_CONTENDERS))
        self.assertNotIn("--escape false", "\n".join(trained))
        coded = self.dry_run("official", "--any-model", "--optimizers", "rite-code")
        self.assertEqual(sum("--escape false" in line for line in coded), 5)

    def dry_run(self, *arguments: str) -> list[str]:
        text, _ = self.run_script(*arguments, "--dry-run")
        return [line for line in text.splitlines() if not line.startswith("reproduce: ")]

    def test_a_dry_run_prints_commands_and_makes_nothing(self):
        make_model(self.path / "model", "gemma")
        make_arc(self.path / "data")
        text, _ = self.run_script("gemma-2b", "--any-model", "--tasks", "arc_challenge", "--dry-run")
        commands = [shlex.split(line) for line in text.splitlines() if not line.startswith("reproduce: ")]
        contenders = recipes.PAPER_CONTENDERS
        rates = sum(len(contender.rates.split(",")) for contender in contenders.values())
        self.assertEqual(sum(command[1] == "train" for command in commands), rates + 2 * len(contenders))
        train = next(command for command in commands if command[1] == "train")
        for option, value in {
            "--rank": "16",
            "--batch": "64",
            "--micro-batch": "4",
            "--dtype": "bfloat16",
            "--target-modules": "q_proj,k_proj,v_proj,up_proj,down_proj",
        }.items():
            self.assertEqual(train[train.index(option) + 1], value)
        self.assertFalse((self.path / "out").exists())

    def test_what_is_missing_is_named(self):
        make_model(self.path / "model", "gemma")
        with self.assertRaisesRegex(SystemExit, "is not that of Gemma 2B: hidden_size is 16, expected 2048"):
            self.run_script("gemma-2b")
        with self.assertRaisesRegex(SystemExit, "(?s)Gemma 2B: .*, nor that of SmolLM2-135M: model_type is 'gemma'"):
            self.run_script("official")
        with self.assertRaisesRegex(SystemExit, "(?s)commonsense: lacks boolq.train.json, .*LLM-Adapters"):
            self.run_script("official", "--any-model")
        index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
        write(self.path / "model/model.safetensors.index.json", index)  # the whole file counts first
        with self.assertRaisesRegex(SystemExit, "(?s)gsm8k: lacks train.jsonl, test.jsonl.*GSM8K"):
            self.run_script("gemma-2b", "--any-model")
        (self.path / "model/model.safetensors").unlink()
        with self.assertRaisesRegex(SystemExit, "lacks model-00001-of-00001.safetensors"):
            self.run_script("gemma-2b", "--any-model")
        (self.path / "model/model.safetensors.index.json").unlink()
        with self.assertRaisesRegex(SystemExit, "lacks model.safetensors"):
            self.run_script("gemma-2b", "--any-model")


if __name__ == "__main__":
    FINETUNE = sys.argv.pop(1)
    unittest.main()
