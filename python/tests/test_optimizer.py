"""What a user of torch.optim expects of an optimizer, and that Python and C++ are one."""

import ast
import copy
import inspect
import io
import json
import math
import os
import pathlib
import pickle
import re
import subprocess
import tempfile
import threading
import time
import unittest

import torch
from torch import nn

import lora_rite
import toy
from lora_rite import FactorPair, LoraRite, _native, create_lora_rite_optimizer, find_factor_pairs

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def through_a_file(state):
    """What torch.save and torch.load(weights_only=True) make of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Input(unittest.TestCase):
    def test_a_module_has_its_pairs_in_one_group_and_its_other_parameters_in_another(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2, weight_decay=0.1, others={"lr": 1e-3})
        self.assertEqual([group["adamw"] for group in optimizer.param_groups], [False, True])
        self.assertEqual([len(group["params"]) for group in optimizer.param_groups], [4, 2])
        self.assertEqual(optimizer.param_groups[1]["param_names"], ["3.weight", "3.bias"])
        self.assertEqual([group["lr"] for group in optimizer.param_groups], [1e-2, 1e-3])
        self.assertEqual([group["weight_decay"] for group in optimizer.param_groups], [0.1, 0.1])

    def test_every_form_of_the_same_parameters_trains_alike(self):
        forms = {
            "module": lambda net: net,
            "named parameters": lambda net: net.named_parameters(),
            "list of named parameters": lambda net: list(net.named_parameters()),
            "param group of a module": lambda net: [{"params": net}],
            "pairs and a group by AdamW": lambda net: [
                {
                    "params": [
                        (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in (net[0], net[2])
                    ]
                },
                {"params": net[3].parameters(), "adamw": True},
            ],
            "FactorPairs and named parameters": lambda net: [
                {"params": find_factor_pairs(net)},
                {"params": net[3].named_parameters()},
            ],
        }
        results = {}
        for name, form in forms.items():
            net = toy.model()
            start = toy.trained(net)
            optimizer = LoraRite(form(net), lr=1e-2)
            toy.train(net, optimizer, 3)
            results[name] = toy.trained(net)
            self.assertTrue(toy.moved(start, results[name]), name)
        for name, result in results.items():
            self.assertTrue(toy.same(result, results["module"]), name)

    def test_a_group_of_pairs_and_others_has_options_for_both(self):
        net = toy.model()
        groups = LoraRite([{"params": net, "lr": 1e-2, "others": {"eps": 1e-4}}], weight_decay=0.1).param_groups
        self.assertEqual([group["lr"] for group in groups], [1e-2, 1e-2])
        self.assertEqual([group["weight_decay"] for group in groups], [0.1, 0.1])
        self.assertEqual([group["eps"] for group in groups], [1e-8, 1e-4])
        groups = LoraRite([{"params": net, "lr": 1e-2}], others={"lr": 1e-3}).param_groups
        self.assertEqual([group["lr"] for group in groups], [1e-2, 1e-3])

    def test_groups_have_options_of_their_own(self):
        net = toy.model()
        optimizer = LoraRite(
            [{"params": net[0], "lr": 0.0}, {"params": net[2], "escape": False}, {"params": net[3], "lr": 0.0}], lr=1e-2
        )
        start = toy.trained(net)
        toy.train(net, optimizer, 2)
        self.assertEqual([group["lr"] for group in optimizer.param_groups], [0.0, 1e-2, 0.0])
        self.assertEqual([group["adamw"] for group in optimizer.param_groups], [False, False, True])
        self.assertEqual([group.get("escape") for group in optimizer.param_groups], [True, False, None])
        moved = {name for name, p in toy.trained(net).items() if not torch.equal(p, start[name])}
        self.assertEqual(moved, {"2.lora_A.default.weight", "2.lora_B.default.weight"})

    def test_a_group_that_is_added_later_trains(self):
        net = toy.model()
        optimizer = LoraRite(net[0], lr=1e-2)
        toy.train(net, optimizer, 1)
        optimizer.add_param_group({"params": net[2], "lr": 1e-3})
        optimizer.add_param_group({"params": list(net[3].parameters()), "adamw": True})
        start = toy.trained(net)
        toy.train(net, optimizer, 2)
        self.assertTrue(toy.moved(start, toy.trained(net)))

    def test_wrappers_of_a_model_change_no_name(self):
        net = toy.model()
        names = [pair.name for pair in find_factor_pairs(net)]
        self.assertEqual(names, ["0.default.weight", "2.default.weight"])
        self.assertEqual([pair.name for pair in find_factor_pairs(torch.compile(net))], names)
        self.assertEqual([pair.name for pair in find_factor_pairs(nn.DataParallel(net))], names)

    def test_experts_in_one_tensor_are_pairs_of_their_own(self):
        a, b = nn.Parameter(torch.randn(3 * 2, 8)), nn.Parameter(torch.randn(12, 2 * 3))
        pair = FactorPair("experts", a, b, experts=3)
        optimizer = LoraRite([pair], lr=1e-2)
        self.assertEqual([p.name for p in optimizer.diagnostics()], ["experts[0]", "experts[1]", "experts[2]"])
        self.assertEqual(len(optimizer.param_groups[0]["params"]), 2)
        # The same factors as pairs with tensors of their own.
        alone = [
            (nn.Parameter(a.detach()[2 * e : 2 * e + 2].clone()), nn.Parameter(b.detach()[:, e::3].clone()))
            for e in range(3)
        ]
        others = LoraRite(alone, lr=1e-2)
        for step in range(3):
            torch.manual_seed(step)
            a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
            for e, (own_a, own_b) in enumerate(alone):
                own_a.grad, own_b.grad = a.grad[2 * e : 2 * e + 2].clone(), b.grad[:, e::3].clone()
            optimizer.step()
            others.step()
        for e, (own_a, own_b) in enumerate(alone):
            torch.testing.assert_close(a.detach()[2 * e : 2 * e + 2], own_a.detach())
            torch.testing.assert_close(b.detach()[:, e::3], own_b.detach())
        one, two = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
        for other in (one, two):
            self.assertEqual([p.name for p in other.diagnostics()], ["experts[0]", "experts[1]", "experts[2]"])


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
        documented = re.findall(r"^ {8}(\w+): ", LoraRite.__doc__, re.MULTILINE)
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
            ({"engine": "gpu"}, "engine is 'gpu', expected 'automatic', 'device' or 'host'"),
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


class Step(unittest.TestCase):
    def test_the_trajectories_are_those_of_the_authors_code(self):
        for name in ("default", "everything", "convolution", "two_shapes"):
            data = json.loads((REPOSITORY / f"tests/golden/{name}.json").read_text(encoding="utf-8"))
            given = dict(data["options"])
            eps = given.pop("eps")
            tensor = lambda values, shape: torch.tensor(values, dtype=torch.double).reshape(shape)  # noqa: E731
            pairs = [[nn.Parameter(tensor(p[k], p[f"{k}_shape"])) for k in "ab"] for p in data["pairs"]]
            for basis in ("polar", "qr"):
                pairs = [[nn.Parameter(tensor(p[k], p[f"{k}_shape"])) for k in "ab"] for p in data["pairs"]]
                optimizer = LoraRite(pairs, **given, eps=eps, eps_root=eps * eps, basis=basis)
                step = 0
                for checkpoint in data["checkpoints"]:
                    while step < checkpoint["step"]:
                        step += 1
                        optimizer.zero_grad()
                        for (a, b), p in zip(pairs, data["pairs"]):
                            product = b.movedim(1, -1).flatten(0, -2) @ a.movedim(0, -1).flatten(0, -2).T
                            error = tensor(p["weight"], product.shape) * (product - tensor(p["target"], product.shape))
                            error.square().sum().div(2).backward()
                        optimizer.step()
                    for pair, expected in zip(pairs, checkpoint["pairs"]):
                        for factor, key in zip(pair, "ab"):
                            torch.testing.assert_close(
                                factor.detach(), tensor(expected[key], factor.shape), rtol=1e-8, atol=1e-9
                            )

    def test_the_product_does_not_depend_on_the_factorisation(self):
        torch.manual_seed(0)
        a, b, t = torch.randn(4, 20).double(), torch.randn(30, 4).double(), torch.randn(4, 4).double()
        target, products = torch.randn(30, 20).double(), []
        for factors in ((a, b), (t @ a, b @ t.inverse())):
            own_a, own_b = (nn.Parameter(factor.clone()) for factor in factors)
            optimizer = LoraRite([(own_a, own_b)], lr=1e-2)
            for _ in range(10):
                optimizer.zero_grad()
                (own_b @ own_a - target).square().sum().backward()
                optimizer.step()
            products.append((own_b @ own_a).detach())
        torch.testing.assert_close(*products, rtol=1e-9, atol=1e-9)
        self.assertGreater((products[0] - b @ a).norm(), 0.1)

    def test_a_closure_is_called_with_gradients_and_its_loss_returned(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)

        def closure():
            self.assertTrue(torch.is_grad_enabled())
            optimizer.zero_grad()
            return toy.backward(net, 0)

        start = toy.trained(net)
        with torch.no_grad():
            loss = optimizer.step(closure)
        self.assertEqual(loss.item(), toy.backward(toy.model(), 0).item())
        self.assertTrue(toy.moved(start, toy.trained(net)))
        self.assertIsNone(optimizer.step())

    def test_zero_grad_and_hooks_are_the_base_class(self):
        net = toy.model()
        optimizer = LoraRite(net)
        toy.backward(net, 0)
        optimizer.zero_grad(set_to_none=False)
        self.assertTrue(all(not p.grad.any() for p in net.parameters() if p.requires_grad))
        optimizer.zero_grad()
        self.assertTrue(all(p.grad is None for p in net.parameters()))
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load_state_dict"))
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(calls, ["before", "after", "state_dict", "load_state_dict"])

    def test_a_factor_without_a_gradient_stays(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        toy.backward(net, 0)
        net[0].lora_A["default"].weight.grad = None
        start = toy.trained(net)
        optimizer.step()
        stayed = [name for name, p in toy.trained(net).items() if torch.equal(p, start[name])]
        self.assertEqual(stayed, ["0.lora_A.default.weight"])

    def test_a_step_with_a_nan_or_infinity_is_skipped_and_counted(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 2)
        for number, value in enumerate((math.nan, math.inf)):
            optimizer.zero_grad()
            toy.backward(net, 5)
            net[3].bias.grad[1] = value
            start, state = toy.trained(net), optimizer.state_of("0.default.weight")
            optimizer.step()
            self.assertTrue(toy.same(start, toy.trained(net)))
            self.assertTrue(
                torch.equal(optimizer.state_of("0.default.weight")["a"]["momentum"], state["a"]["momentum"])
            )
            self.assertEqual(optimizer.skipped_steps(), number + 1)
        self.assertEqual(optimizer.diagnostics()[0].skipped_steps, 2)

    @unittest.skipIf(lora_rite.kernel_name() == "none", "engine 'host' has no kernels here")
    def test_diagnostics_count_the_steps_in_double(self):
        torch.manual_seed(0)
        scales = torch.logspace(-3, 3, 4)
        a, b = nn.Parameter(scales[:, None] * torch.randn(4, 24)), nn.Parameter(torch.randn(20, 4) / scales)
        mix = torch.linalg.qr(torch.randn(4, 4))[0]
        with torch.no_grad():
            a.copy_(mix @ a)
            b.copy_(b @ mix.T)
        optimizer = LoraRite([(a, b)], lr=1e-3, engine="host")
        for _ in range(3):
            a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
            optimizer.step()
        in_double = optimizer.diagnostics()[0].a.in_double
        self.assertEqual((in_double.gradient_map, in_double.cross_product), (3, 3))

    def test_gradients_that_are_accumulated_are_those_of_the_whole_batch(self):
        nets = toy.model(dtype=torch.double), toy.model(dtype=torch.double)
        optimizers = [LoraRite(net, lr=1e-2) for net in nets]
        for number in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(number)).double()
            nets[0](x).square().mean().backward()
            for half in x.chunk(2):
                (nets[1](half).square().mean() / 2).backward()
            for optimizer in optimizers:
                optimizer.step()
        one, two = map(toy.trained, nets)
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)

    def test_half_factors_train_and_master_weights_keep_small_steps(self):
        for dtype in (torch.bfloat16, torch.float16):
            factors = {}
            for master in (False, True):
                a, b = nn.Parameter(torch.ones(1, 8, dtype=dtype)), nn.Parameter(torch.ones(8, 1, dtype=dtype))
                optimizer = LoraRite([(a, b)], lr=1e-4, master_weights=master)
                for _ in range(400):
                    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
                    optimizer.step()
                factors[master] = a.detach().clone()
            self.assertTrue(torch.equal(factors[False], torch.ones(1, 8, dtype=dtype)))
            self.assertTrue((factors[True] < 1).all(), factors[True])

    def test_autocast_and_a_grad_scaler(self):
        net, plain = toy.model(), toy.model()
        optimizer, other = LoraRite(net, lr=1e-2), LoraRite(plain, lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number in range(3):
            optimizer.zero_grad()
            other.zero_grad()
            toy.backward(net, number, scale=scaler.get_scale() if number else 1024.0)
            toy.backward(plain, number)
            scaler.scale(torch.ones(()))  # as scale(loss) does, it makes the scale
            scaler.step(optimizer)
            scaler.update()
            other.step()
        self.assertTrue(toy.same(toy.trained(net), toy.trained(plain)))  # a power of two
        start = toy.trained(net)
        optimizer.zero_grad()
        toy.backward(net, 9, scale=math.inf)
        scaler.step(optimizer)
        scaler.update()
        self.assertTrue(toy.same(start, toy.trained(net)))
        self.assertEqual((scaler.get_scale(), optimizer.skipped_steps()), (512.0, 0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.zero_grad()
            toy.backward(net, 10)
        optimizer.step()
        self.assertTrue(toy.moved(start, toy.trained(net)))

    def test_the_interpreter_runs_on_during_a_step(self):
        a, b = nn.Parameter(torch.randn(64, 4096)), nn.Parameter(torch.randn(4096, 64))
        optimizer = LoraRite([(a, b)], lr=1e-3)
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
        optimizer.step()
        inside, ticks, done = threading.Event(), [], threading.Event()

        def count():
            inside.wait()
            while not done.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0)

        thread = threading.Thread(target=count)
        thread.start()
        inside.set()
        begin = time.perf_counter()
        for _ in range(20):
            optimizer._native.step()
        end = time.perf_counter()
        done.set()
        thread.join()
        # Were the lock held, the other thread would tick between the steps alone.
        self.assertGreater(sum(begin < tick < end for tick in ticks), 60)


class State(unittest.TestCase):
    def check_resumes(self, make, **loop):
        """Steps 4 to 8 after a state_dict through a file are those of an uninterrupted run, to the bit."""
        net = toy.model()
        optimizer = make(net)
        toy.train(net, optimizer, 4)
        weights, state = through_a_file(net.state_dict()), through_a_file(optimizer.state_dict())
        expected = toy.train(net, optimizer, 4, first=4)
        resumed = toy.model(seed=7)
        resumed.load_state_dict(weights)
        other = make(resumed)
        other.load_state_dict(state)
        self.assertEqual(toy.train(resumed, other, 4, first=4), expected)
        self.assertTrue(toy.same(toy.trained(net), toy.trained(resumed)))
        return optimizer, other

    def test_it_resumes_to_the_bit_with_all_options(self):
        for options in (
            {}, {"basis": "qr"}, {"escape": False, "weight_decay": 0.1, "betas": (0.8, 0.9)},
            {"row_equilibration": True}, {"max_relative_change": 0.3, "balance": True}, {"engine": "device"},
            {"others": {"amsgrad": True}},
        ):  # fmt: skip
            with self.subTest(options):
                self.check_resumes(lambda net, options=options: LoraRite(net, lr=1e-2, **options))

    def test_options_are_restored_but_for_those_of_the_machine(self):
        net = toy.model()
        saved = LoraRite(net, lr=1e-2, escape=False, engine="device", others={"lr": 1e-3})
        torch.optim.lr_scheduler.StepLR(saved, 5)
        state = saved.state_dict()
        state["param_groups"][1]["lr"] = 2  # an edit counts
        optimizer = LoraRite(net, lr=1.0)
        optimizer.load_state_dict(state)
        groups = optimizer.param_groups
        self.assertEqual([g["lr"] for g in groups], [1e-2, 2])
        self.assertEqual([g["initial_lr"] for g in groups], [1e-2, 1e-3])
        self.assertEqual((groups[0]["escape"], groups[0]["engine"]), (False, "automatic"))
        self.assertEqual(set(groups[0]), set(saved.param_groups[0]))
        optimizer.step()
        self.assertEqual(optimizer._native.options_of(1)["lr"], 2)

    def test_a_state_has_tensors_and_plain_values_only(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 2)

        def check(value):
            if isinstance(value, dict):
                for key, item in value.items():
                    self.assertIsInstance(key, str)
                    check(item)
            elif isinstance(value, (list, tuple)):
                for item in value:
                    check(item)
            else:
                self.assertIn(type(value), (torch.Tensor, int, float, bool, str))

        check(optimizer.state_dict())

    def test_names_survive_another_order(self):
        adapters = ("one", "two", "three")
        net = toy.model(adapters)
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 3)
        state = through_a_file(optimizer.state_dict())
        other = toy.model(("three", "one", "two"))
        other.load_state_dict(net.state_dict())
        named = sorted(other.named_parameters())  # the head's bias before its weight, too
        resumed = LoraRite(named, lr=1e-2)
        order = [[p.name for p in o.diagnostics()] for o in (optimizer, resumed)]
        self.assertNotEqual(*order)
        self.assertEqual(*map(sorted, order))
        resumed.load_state_dict(state)
        for name in order[0]:
            for side in "ab":
                one, two = (o.state_of(name)[side]["momentum"] for o in (optimizer, resumed))
                self.assertTrue(torch.equal(one, two), name)
        self.assertEqual([p.name for p in resumed.diagnostics()], order[1])
        here, there = optimizer.param_groups[1], resumed.param_groups[1]
        self.assertEqual((here["param_names"], there["param_names"]), (["3.weight", "3.bias"], ["3.bias", "3.weight"]))
        for tree, place in ((optimizer.state, "1"), (resumed.state, "0")):
            self.assertEqual(tree["1"][place]["mean"].shape, (4,))

    def test_a_state_that_does_not_fit_is_refused_by_name_and_nothing_changes(self):
        net, other = toy.model(), toy.model(("default", "more"))
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 2)
        state = optimizer.state_dict()
        for bad, words in (
            (LoraRite(other), "loaded state dict contains a parameter group that doesn't match the size"),
            (LoraRite(toy.model(("another",))), r"pairs '0.another.weight' '2.another.weight' are not here"),
            (LoraRite(toy.model(), basis="qr"), "basis is 'qr', expected 'polar'"),
            (torch.optim.SGD([{"params": g["params"]} for g in optimizer.param_groups]), "has no entry 'format'"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                optimizer.load_state_dict(bad.state_dict())
        adam = torch.optim.Adam([{"params": g["params"]} for g in optimizer.param_groups])
        adam.step()
        for load in (optimizer.load_state_dict, optimizer.load_matching):
            with self.assertRaisesRegex(ValueError, "the state is that of another optimizer"):
                load(adam.state_dict())
        broken = copy.deepcopy(state)
        broken["state"]["0"]["1"]["momentum_b"] = torch.zeros(2, 2)
        with self.assertRaisesRegex(ValueError, r"'2.default.weight': entry 'momentum_b' has shape \[2, 2\]"):
            optimizer.load_state_dict(broken)
        broken = copy.deepcopy(state)
        broken["param_groups"][0]["lr"] = -1.0
        with self.assertRaisesRegex(ValueError, "lr is -1"):
            optimizer.load_state_dict(broken)
        for one, two in zip(walk(state), walk(optimizer.state_dict())):
            self.assertTrue(torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two)

    def test_load_matching_takes_a_part(self):
        net = toy.model(("one", "two"))
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 2)
        other = LoraRite(toy.model(("uno", "three")), lr=1.0)
        report = other.load_matching(optimizer.state_dict(), rename=lambda name: name.replace("one", "uno"))
        self.assertEqual(report.loaded, ["0.uno.weight", "2.uno.weight", "group 1"])
        self.assertEqual(report.kept, ["0.three.weight", "2.three.weight"])
        self.assertEqual(report.unused, ["0.two.weight", "2.two.weight"])
        self.assertEqual(other.param_groups[0]["lr"], 1.0)
        one, two = optimizer.state_of("0.one.weight"), other.state_of("0.uno.weight")
        self.assertTrue(torch.equal(one["a"]["momentum"], two["a"]["momentum"]))
        with self.assertRaisesRegex(ValueError, "nothing of the archive is here"):
            other.load_matching(LoraRite(toy.model(("x",))[0]).state_dict())

    def test_pickle_and_deepcopy_go_on_as_the_original(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2, others={"lr": 1e-3})
        toy.train(net, optimizer, 3)
        optimizer.param_groups[0]["lr"] = 2e-2
        copies = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
        expected = toy.train(net, optimizer, 3, first=3)
        for other_net, other in copies:
            self.assertTrue(all(p is not q for p, q in zip(net.parameters(), other_net.parameters())))
            self.assertEqual(toy.train(other_net, other, 3, first=3), expected)
            self.assertEqual(repr(other), repr(optimizer))
            other.register_step_post_hook(lambda *_: None)

    def test_a_state_without_a_step_leaves_the_module_free_to_move(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
        net.double()
        losses = toy.train(net, optimizer, 3)
        self.assertLess(losses[2], losses[0])

    def test_repr_tells_groups_and_options_and_no_tensors(self):
        text = repr(LoraRite(toy.model(), lr=1e-2))
        self.assertTrue(text.startswith("LoraRite (\nParameter Group 0: 2 pairs\n    balance: False\n"), text)
        self.assertIn("Parameter Group 1: 2 parameters by AdamW\n    amsgrad: False\n", text)
        self.assertIn("    lr: 0.01\n", text)
        self.assertNotIn("tensor", text.lower())

    def test_what_is_remembered_can_be_read_and_forgotten(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        self.assertIsNone(optimizer.state_of("0.default.weight"))
        toy.train(net, optimizer, 2)
        state = optimizer.state_of("0.default.weight")
        self.assertEqual((state["a"]["steps"], state["a"]["momentum"].shape), (2, (2, 8)))
        optimizer.reset_state("0.default.weight")
        self.assertIsNone(optimizer.state_of("0.default.weight"))
        self.assertEqual(optimizer.state_of("2.default.weight")["b"]["steps"], 2)
        optimizer.reset_state()
        self.assertIsNone(optimizer.state_of("2.default.weight"))
        with self.assertRaisesRegex(ValueError, "no pair 'x', expected one of '0.default.weight'"):
            optimizer.state_of("x")
        told = optimizer.diagnostics()[0]
        self.assertEqual(told.name, "0.default.weight")
        factor = net[0].lora_A["default"].weight.detach()
        self.assertAlmostEqual(told.a.condition_number, torch.linalg.cond(factor).item(), places=4)


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

    def test_no_file_and_no_optimizer_are_refused(self):
        optimizer = LoraRite(toy.model())
        with self.assertRaises((ValueError, RuntimeError)):
            optimizer.load(self.path)
        self.path.write_bytes(b"nothing")
        with self.assertRaises((ValueError, RuntimeError)):
            optimizer.load(self.path)

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


def walk(value):
    """All that is in nested dicts and lists."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield key
            yield from walk(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from walk(item)
    else:
        yield value


class Refusals(unittest.TestCase):
    def check(self, params, words, error=ValueError):
        with self.assertRaisesRegex(error, words):
            LoraRite(params)

    def test_what_cannot_be_stepped_is_refused_by_name(self):
        net = toy.model()
        self.check(net.parameters(), "params has a tensor without a name")
        self.check(net[0].lora_A["default"].weight, "params is a tensor", TypeError)
        self.check([1], "params has a int, expected", TypeError)
        self.check([], "group 0 has no trainable parameters")
        self.check(nn.Linear(2, 2).requires_grad_(False), "group 0 has no trainable parameters")
        self.check(
            nn.Linear(2, 2), "no LoRA factors .*among what is trained 'weight' 'bias', expected at least one pair"
        )
        self.check([("x", None)], r"params has a tuple, expected \(name, parameter\) or a pair", TypeError)
        self.check(toy.model().requires_grad_(False), "none of the parameters requires a gradient, .*is_trainable=True")
        self.check(toy.model().to("meta"), "pair '0.default.weight': factor a is on the device meta")
        a, b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        self.check([("k.lora_A.weight", a)], "'k.lora_A.weight' has no partner, expected a parameter 'k.lora_B.weight'")
        self.check([(b, a)], "the ranks differ|the rank .* is above both sides")
        self.check([(a, b), (a, b)], "used twice")
        self.check([(a * 1, b)], "expected a leaf")
        self.check([("k.lora_E", a), ("k.lora_A", a), ("k.lora_B", b)], "AdaLoRA")

    def test_adapters_of_other_kinds_are_refused_by_name(self):
        for name in ("hada_w1_a", "lokr_w1", "vera_lambda_b"):
            layer = nn.Module()
            layer.register_parameter(name, nn.Parameter(torch.randn(2, 8)))
            self.check(layer, f"among what is trained '{name}', .*LoHa, LoKr, VeRA")

    def test_magnitudes_of_dora_are_stepped_by_adamw(self):
        net = toy.model()
        net[0].lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(torch.ones(16))})
        optimizer = LoraRite(net)
        self.assertIn("0.lora_magnitude_vector.default", optimizer.param_groups[1]["param_names"])

    def test_shards_are_refused(self):
        class DTensor(torch.Tensor):
            pass

        class FullyShardedDataParallel(nn.Module):
            pass

        net = toy.model()
        part = FullyShardedDataParallel()
        part.inner = net
        self.check(part, "sharded by FullyShardedDataParallel")
        a, b = torch.randn(2, 8), torch.randn(6, 2)
        self.check([("x", a.as_subclass(DTensor), b)], "pair 'x': factor a is a DTensor")
        sharded = nn.Parameter(a)
        sharded.ds_id = 1
        self.check([("x", sharded, b)], "sharded by DeepSpeed")
        for change in (
            lambda group: group.update(params=[nn.Parameter(torch.zeros(7))]),  # as ZeRO 1 and 2 do
            lambda group: group.update(params=[nn.Parameter(p.detach()) for p in group["params"]]),
            lambda group: group["params"].reverse(),
        ):
            optimizer = LoraRite(net)
            change(optimizer.param_groups[0])
            with self.assertRaisesRegex(ValueError, r"param_groups\[0\]\['params'\] has other tensors"):
                optimizer.step()

    def test_sparse_gradients_are_refused(self):
        a, b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        optimizer = LoraRite([("x", a, b)])
        a.grad = torch.randn(2, 8).to_sparse()
        start = a.detach().clone()
        with self.assertRaisesRegex(ValueError, "pair 'x': .*Sparse"):
            optimizer.step()
        self.assertTrue(torch.equal(a, start))


class Package(unittest.TestCase):
    def test_versions(self):
        header = (REPOSITORY / "include/lora_rite/version.hpp").read_text(encoding="utf-8")
        self.assertEqual(lora_rite.__version__, ".".join(re.findall(r"VERSION_\w+ (\d+)", header)))

    def test_the_stubs_have_what_the_native_module_has(self):
        stub = pathlib.Path(_native.__file__).with_name("_native.pyi")
        tree = ast.parse(stub.read_text(encoding="utf-8"))
        names = lambda body: {  # noqa: E731
            n.target.id if isinstance(n, ast.AnnAssign) else n.name
            for n in body
            if isinstance(n, (ast.AnnAssign, ast.FunctionDef, ast.ClassDef))
        }
        public = lambda thing: {n for n in vars(thing) if not n.startswith("_")}  # noqa: E731
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
