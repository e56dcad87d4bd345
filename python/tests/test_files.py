"""Files of Python load in C++ and the other way round."""

import copy
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import unittest

import torch
from torch import nn

import toy
from lora_rite import FactorPair, LoraRite


class Files(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name) / "optimizer.pt"

    def test_a_file_of_its_own_resumes_to_the_bit(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 3)
        optimizer.save(self.path)
        other_net = copy.deepcopy(net)
        other = LoraRite(other_net, lr=1.0)
        other.load(self.path)
        self.assertEqual([g["lr"] for g in other.param_groups], [1e-2, 1e-2])
        self.assertEqual(toy.train(net, optimizer, 3, first=3), toy.train(other_net, other, 3, first=3))

    def test_a_file_that_cannot_be_written_leaves_the_old_one(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        optimizer.save(self.path)
        old = self.path.read_bytes()
        toy.train(net, optimizer, 1)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # a full disk
            with self.assertRaisesRegex(ValueError, "optimizer.pt' cannot be written: File too large"):
                optimizer.save(self.path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, handler)
        self.assertEqual(self.path.read_bytes(), old)
        self.assertEqual([path.name for path in self.path.parent.iterdir()], ["optimizer.pt"])
        with self.assertRaisesRegex(ValueError, "none/optimizer.pt' cannot be written: No such file or directory"):
            optimizer.save(self.path.parent / "none" / "optimizer.pt")
        optimizer.save(self.path)
        self.assertNotEqual(self.path.read_bytes(), old)

    def test_other_threads_run_while_a_file_is_written(self):
        """A pipe waits for its other end, which another thread has."""
        program = """
            import os, sys, threading
            import toy
            from lora_rite import LoraRite

            path = sys.argv[1]
            os.mkfifo(path + ".tmp")
            reader = threading.Thread(target=lambda: print(len(open(path + ".tmp", "rb").read()) > 1000))
            reader.start()
            try:
                LoraRite(toy.model()).save(path)
            except ValueError as error:  # a pipe cannot be brought to the disk
                reader.join()
                print(error)
        """
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program), str(self.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, "^True\n'.*' cannot be written: Invalid argument\n$")

    def test_no_file_and_no_optimizer_are_refused(self):
        optimizer = LoraRite(toy.model())
        words = "cannot be read .*, expected a file of LoraRite.save"
        with self.assertRaisesRegex(ValueError, words):
            optimizer.load(self.path)
        self.path.write_bytes(b"nothing")
        with self.assertRaisesRegex(ValueError, words):
            optimizer.load(self.path)
        torch.save(optimizer.state_dict(), self.path)
        with self.assertRaisesRegex(ValueError, words + r".*load_state_dict\(torch.load\(path\)\)"):
            optimizer.load(self.path)

    def test_pairs_of_groups_with_different_options_are_not_mixed(self):
        net = toy.model()
        one, two = (list(net[place].named_parameters(str(place))) for place in (0, 2))
        LoraRite([{"params": one, "lr": 0.1}, {"params": two}], lr=1e-2).save(self.path)
        together = LoraRite(one + two, lr=7.0)
        with self.assertRaisesRegex(ValueError, r"pairs of group 0 are in groups \[0, 1\] of the state, whose options"):
            together.load(self.path)
        self.assertEqual(together.param_groups[0]["lr"], 7.0)

    @unittest.skipUnless(os.environ.get("LORA_RITE_EXCHANGE"), "LORA_RITE_EXCHANGE names no program (tests/python)")
    def test_files_of_cpp_load_here_and_files_of_here_load_in_cpp(self):
        """Two steps in C++, two here, two in C++: the parameters are those of six steps here.

        Not to the bit: the two were compiled with other options.
        """
        program, folder = os.environ["LORA_RITE_EXCHANGE"], self.path.parent
        shapes = {"x": ((2, 8), (6, 2)), "y": ((3, 8), (4, 3)), "z": ((2, 8), (6, 2))}

        def start():
            torch.manual_seed(3)
            pairs = [FactorPair(name, *(nn.Parameter(torch.randn(s)) for s in both)) for name, both in shapes.items()]
            head = nn.Parameter(torch.randn(5))
            return pairs, head, [factor for pair in pairs for factor in pair[1:3]] + [head]

        def optimizer_of(pairs, head, lr=1e-2):
            return LoraRite([{"params": pairs}, {"params": [head], "adamw": True}], lr, weight_decay=0.1)

        def step(optimizer, parameters, number):
            for parameter in parameters:
                parameter.grad = (parameter.detach() * (1 + number)).cos()
            optimizer.step()

        pairs, head, expected = start()
        optimizer = optimizer_of(pairs, head)
        for number in range(6):
            step(optimizer, expected, number)

        pairs, head, parameters = start()
        for first in (0, 4):
            values = b"".join(parameter.detach().numpy().tobytes() for parameter in parameters)
            (folder / "factors").write_bytes(values)
            subprocess.run([program, str(folder), "2", str(first)], check=True)
            values = torch.frombuffer(bytearray((folder / "factors").read_bytes()), dtype=torch.float32)
            with torch.no_grad():
                for parameter, part in zip(parameters, values.split([p.numel() for p in parameters])):
                    parameter.copy_(part.view_as(parameter))
            if first == 0:
                optimizer = optimizer_of(pairs, head, lr=1.0)
                optimizer.load(self.path)
                step(optimizer, parameters, 2)
                step(optimizer, parameters, 3)
                optimizer.save(self.path)
        for one, two in zip(parameters, expected):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    unittest.main()
