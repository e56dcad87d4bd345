"""Options are those of C++, and what is in param_groups is obeyed."""

import inspect
import math
import pathlib
import re
import unittest

import torch

import toy
from lora_rite import LoraRite, _native

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


class Options(unittest.TestCase):
    def test_the_signature_has_the_options_and_defaults_of_cpp(self):
        parameters = inspect.signature(LoraRite).parameters
        self.assertEqual(list(parameters), ["params", *_native.options, "others", "basis"])
        for name, default in _native.options.items():
            self.assertEqual(parameters[name].default, default, name)
            self.assertIs(type(parameters[name].default), type(default), name)

    def test_the_options_are_all_of_cpp_and_each_is_documented(self):
        header = (REPOSITORY / "include/lora_rite/options.hpp").read_text(encoding="utf-8")
        in_cpp = re.findall(r"TORCH_ARG\(\w+, (\w+)\)", header)
        self.assertEqual(set(in_cpp), set(_native.options))
        documented = re.findall(r"^ {4}(\w+): ", inspect.getdoc(LoraRite), re.MULTILINE)
        self.assertEqual(documented, list(inspect.signature(LoraRite).parameters))

    def test_every_option_reaches_cpp_from_the_constructor_and_from_param_groups(self):
        changed = {
            "lr": 0.5, "betas": (0.1, 0.2), "eps": 0.3, "eps_root": 0.4, "preconditioner_exponent": 0.25,
            "weight_decay": 0.6, "escape": False, "clip_unmagnified_norm": 0.7, "max_update_rms": 0.8,
            "max_relative_change": 0.9, "row_equilibration": True, "lr_ratio_b": 1.1, "balance": True, "maximize": True,
            "master_weights": True, "engine": "device", "capturable": True,
        }  # fmt: skip
        self.assertEqual(changed.keys(), _native.options.keys())
        self.assertEqual(LoraRite(toy.model(), **changed)._native.options_of(0), changed)
        optimizer = LoraRite(toy.model())
        optimizer.param_groups[0].update(changed)
        optimizer.step()
        self.assertEqual(optimizer._native.options_of(0), changed)
        others = {"lr": 0.5, "betas": (0.1, 0.2), "eps": 0.3, "weight_decay": 0.4, "amsgrad": True, "maximize": True}
        self.assertEqual(LoraRite(toy.model(), others=others)._native.options_of(1), others)

    def test_an_engine_in_param_groups_is_obeyed_before_the_first_step_and_refused_after_it(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        optimizer.param_groups[0]["engine"] = "device"
        toy.train(net, optimizer, 1)
        self.assertEqual(optimizer._native.options_of(0)["engine"], "device")
        start = toy.trained(net)
        optimizer.param_groups[0]["engine"] = "host"
        with self.assertRaisesRegex(ValueError, "group 0: engine is 'host' after the first step, expected 'device'"):
            toy.train(net, optimizer, 1)
        self.assertTrue(toy.same(start, toy.trained(net)))
        optimizer.param_groups[0]["engine"] = "device"
        optimizer.add_param_group({"params": toy.LoraLinear(4, 4, 2)})
        optimizer.param_groups[2]["engine"] = "device"  # a group that has not stepped yet
        toy.train(net, optimizer, 1)
        self.assertTrue(toy.moved(start, toy.trained(net)))
        optimizer.reset_state()  # the next step is the first one of a new optimizer
        optimizer.param_groups[0]["engine"] = "automatic"
        toy.train(net, optimizer, 1)
        loaded = LoraRite(net, lr=1e-2)
        loaded.load_state_dict(LoraRite(net).state_dict())  # nothing was remembered there
        loaded.param_groups[0]["engine"] = "device"
        toy.train(net, loaded, 1)
        loaded = LoraRite(net, lr=1e-2)
        state = LoraRite(net, lr=1e-2)
        state.step()
        loaded.load_state_dict(state.state_dict())
        loaded.param_groups[0]["engine"] = "device"
        with self.assertRaisesRegex(ValueError, "after the first step"):
            loaded.step()

    def test_a_rate_in_param_groups_is_obeyed_at_the_next_step_be_it_a_number_or_a_tensor(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 1)
        rate = torch.tensor(0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        start = toy.trained(net)
        toy.train(net, optimizer, 1)
        self.assertTrue(toy.same(start, toy.trained(net)))
        rate.fill_(1e-2)
        toy.train(net, optimizer, 1)
        self.assertTrue(toy.moved(start, toy.trained(net)))

    def test_schedulers_drive_all_groups(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2, others={"lr": 1e-3})
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        toy.train(net, optimizer, 3, scheduler=scheduler)
        self.assertEqual([g["lr"] for g in optimizer.param_groups], [1e-2 / 4, 1e-3 / 4])
        optimizer.upload_rates()
        self.assertEqual([optimizer._native.options_of(i)["lr"] for i in (0, 1)], [1e-2 / 4, 1e-3 / 4])
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)  # changes betas as well
        toy.train(net, optimizer, 3, scheduler=cycle)
        optimizer.step()
        self.assertEqual(optimizer._native.options_of(0)["betas"], optimizer.param_groups[0]["betas"])

    def test_what_is_out_of_range_is_refused_by_name_and_nothing_changes(self):
        net = toy.model()
        for options, words in (
            ({"lr": -1.0}, "lr is -1, expected a finite number"),
            ({"lr": math.nan}, "lr is nan"),
            ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1"),
            ({"preconditioner_exponent": 0.6}, "preconditioner_exponent is 0.6"),
            ({"basis": "svd"}, "basis is 'svd', expected 'polar' or 'qr'"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                LoraRite(net, **options)
        for options, words in (
            ({"engine": "gpu"}, "engine is 'gpu', expected 'automatic', 'device', 'host' or 'cuda'"),
            ({"escape": 1}, "escape is 1, expected True or False"),
            ({"betas": 0.9}, "betas is 0.9, expected a pair of numbers"),
            ({"others": {"betaz": 1}}, "others has 'betaz', expected some of lr, "),
        ):
            with self.assertRaisesRegex(TypeError, words):
                LoraRite(net, **options)
        with self.assertRaisesRegex(TypeError, "others has 'escape', expected some of lr, "):
            LoraRite([{"params": net, "others": {"escape": True}}])
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 1)
        start = toy.trained(net)
        optimizer.param_groups[0]["lr"] = -1
        with self.assertRaisesRegex(ValueError, "group 0: lr is -1"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.param_groups[1]["maximize"] = True
        with self.assertRaisesRegex(ValueError, "group 1: maximize is True"):
            optimizer.step()
        self.assertTrue(toy.same(start, toy.trained(net)))


if __name__ == "__main__":
    unittest.main()
