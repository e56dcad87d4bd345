"""The step, and what a user of torch.optim expects of it."""

import json
import math
import pathlib
import threading
import time
import unittest

import torch
from torch import nn

import lora_rite
import toy
from lora_rite import LoraRite

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


class Step(unittest.TestCase):
    def test_the_trajectories_are_those_of_the_authors_code(self):
        for name in ("default", "everything", "convolution", "two_shapes"):
            data = json.loads((REPOSITORY / f"tests/golden/{name}.json").read_text(encoding="utf-8"))
            given = dict(data["options"])
            eps = given.pop("eps")
            tensor = lambda values, shape: torch.tensor(values, dtype=torch.double).reshape(shape)
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


if __name__ == "__main__":
    unittest.main()
