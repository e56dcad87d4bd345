#!/usr/bin/env python3
"""scripts/reproduce from end to end, with tiny models of random weights: reproduce_test.py FINETUNE

Gemma chooses among rates on questions with choices, mT5 follows instructions and writes; both go on where they were.
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

FINETUNE = ""
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .:#?,'\n"]  # 48, as the models


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
        run = reproduce.Commands.run

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
        reproduce.Commands.run = listed
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                reproduce.main()
        finally:
            reproduce.Commands.run = run
            sys.argv = arguments
        return out.getvalue(), commands

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

        results = json.loads((self.path / "out/results.json").read_text())
        self.assertEqual(
            [(result["optimizer"], result["rate"]) for result in results], [("rite", "3e-2"), ("adam", "1e-2")]
        )
        for result in results:
            self.assertEqual([test["examples"] for test in result["tests"]], [6, 6])
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
        (metrics.parent / "test.json").unlink()
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
        results = json.loads((self.path / "out/results.json").read_text())
        self.assertEqual(results[0]["tests"][0]["examples"], 3)
        self.assertIn("| super_ni | rouge_l | rite | 1e-2 | ", text)
        records = {
            part: (self.path / f"out/data/super_ni.{part}.jsonl").read_text().splitlines()[1:]
            for part in ("train", "validation", "test")
        }
        self.assertEqual([len(lines) for lines in records.values()], [3, 3, 3])
        self.assertEqual(set(records["train"]) & set(records["validation"]), set())

    def test_a_dry_run_prints_commands_and_makes_nothing(self):
        make_model(self.path / "model", "gemma")
        make_arc(self.path / "data")
        text, _ = self.run_script("gemma-2b", "--any-model", "--tasks", "arc_challenge", "--dry-run")
        commands = [shlex.split(line) for line in text.splitlines() if not line.startswith("reproduce: ")]
        rates = sum(len(grid.split(",")) for grid in reproduce.RATES.values())
        self.assertEqual(sum(command[1] == "train" for command in commands), rates + 2 * len(reproduce.RATES))
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
