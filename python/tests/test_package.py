"""Versions, stubs, the factory, and Python's share of a step."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import time
import unittest

import torch
from torch import nn

import lora_rite
import toy
from lora_rite import LoraRite, _native, create_lora_rite_optimizer

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


class Package(unittest.TestCase):
    def test_versions(self):
        header = (REPOSITORY / "include/lora_rite/version.hpp").read_text(encoding="utf-8")
        self.assertEqual(lora_rite.__version__, ".".join(re.findall(r"VERSION_\w+ (\d+)", header)))

    def test_the_wheel_has_the_licence(self):
        try:
            files = importlib.metadata.files("lora_rite")
        except importlib.metadata.PackageNotFoundError:
            self.skipTest("the package is not installed")
        licences = [file.read_text() for file in files if file.name == "LICENSE"]
        self.assertEqual(licences, [(REPOSITORY / "LICENSE").read_text(encoding="utf-8")])

    def test_another_torch_than_it_was_built_for_is_refused(self):
        code = "import torch; torch.__version__ = '2.99.0'; import lora_rite"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        sentence = rf"ImportError: lora_rite was built for torch {_native.torch_version}, and torch 2\.99\.0 is here, "
        self.assertRegex(result.stderr.strip().splitlines()[-1], sentence)

    def test_the_stubs_have_what_the_native_module_has(self):
        stub = pathlib.Path(_native.__file__).with_name("_native.pyi")
        tree = ast.parse(stub.read_text(encoding="utf-8"))
        names = lambda body: {
            n.target.id if isinstance(n, ast.AnnAssign) else n.name
            for n in body
            if isinstance(n, (ast.AnnAssign, ast.FunctionDef, ast.ClassDef))
        }
        public = lambda thing: {n for n in vars(thing) if not n.startswith("_")}
        self.assertEqual(names(tree.body) - {"__version__"}, public(_native))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self.assertEqual(names(node.body) - {"__init__"}, public(getattr(_native, node.name)), node.name)

    def test_a_factory_as_pefts(self):
        optimizer = create_lora_rite_optimizer(toy.model(), lr=1e-2, escape=False)
        self.assertEqual((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["escape"]), (1e-2, False))

    def test_pythons_share_of_a_step(self):
        """At most 50 µs and 2 µs a pair: a step by the class less one by the native optimizer."""
        pairs = [(nn.Parameter(torch.randn(1, 1)), nn.Parameter(torch.randn(1, 1))) for _ in range(126)]
        optimizer = LoraRite(pairs)
        optimizer.step()
        shares = []
        for _ in range(50):
            begin = time.perf_counter()
            optimizer.step()
            middle = time.perf_counter()
            optimizer._native.step()
            shares.append(2 * middle - begin - time.perf_counter())
        share = 1e6 * sorted(shares)[len(shares) // 2]
        print(f"\nPython's share of a step of 126 pairs: {share:.0f} µs")
        self.assertLess(share, 3 * (50 + 2 * 126))  # a busy machine's clock is no judge


if __name__ == "__main__":
    unittest.main()
