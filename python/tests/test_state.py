"""States: resuming to the bit, by names, copies, what is told and forgotten."""

import copy
import io
import pickle
import unittest

import torch

import toy
from lora_rite import LoraRite


def through_a_file(state):
    """What torch.save and torch.load(weights_only=True) make of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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

    def test_options_of_groups_follow_their_pairs_and_parameters(self):
        rates = {"one": 1e-2, "two": 1e-3, "three": 0.0}

        def make(order):
            net = toy.model(order)
            named = list(net.named_parameters())
            groups = [{"params": [n for n in named if f".{name}." in n[0]], "lr": rates[name]} for name in order]
            head = [{"params": [n for n in named if n[0] == f"3.{what}"], "lr": lr} for what, lr in heads[order[0]]]
            return net, LoraRite(groups + head)

        heads = {"one": [("weight", 0.1), ("bias", 0.2)], "three": [("bias", 0.2), ("weight", 0.1)]}
        net, optimizer = make(("one", "two", "three"))
        other, resumed = make(("three", "one", "two"))
        toy.train(net, optimizer, 2)
        for group in resumed.param_groups:
            group["lr"] = 7.0
        other.load_state_dict(net.state_dict())
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        self.assertEqual([group["lr"] for group in resumed.param_groups], [0.0, 1e-2, 1e-3, 0.2, 0.1])
        toy.train(net, optimizer, 2, first=2)
        toy.train(other, resumed, 2, first=2)
        for name, p in other.named_parameters():  # sums over pairs are in another order
            torch.testing.assert_close(p, dict(net.named_parameters())[name], rtol=1e-4, atol=1e-6)

    def test_a_state_without_its_momentum_is_refused(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 2)
        for broken in (None, "x", {}):
            state = through_a_file(optimizer.state_dict())
            state["state"]["0"]["1"]["momentum_b"] = broken
            if broken is None:
                del state["state"]["0"]["1"]["momentum_b"]
            with self.assertRaisesRegex(ValueError, "'2.default.weight'.* no entry 'momentum_b'"):
                LoraRite(toy.model(), lr=1e-2).load_state_dict(state)

    def test_emptying_the_state_forgets_it(self):
        net = toy.model()
        optimizer = LoraRite(net, lr=1e-2)
        toy.train(net, optimizer, 2)
        optimizer.state = {}
        self.assertIsNone(optimizer.state_of("0.default.weight"))
        with self.assertRaisesRegex(AttributeError, "expected load_state_dict"):
            optimizer.state = {"0": 1}

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
        self.assertRegex(repr(told), "^'0.default.weight': a .condition .*, 0 skipped steps$")
        factor = net[0].lora_A["default"].weight.detach()
        self.assertAlmostEqual(told.a.condition_number, torch.linalg.cond(factor).item(), places=4)


if __name__ == "__main__":
    unittest.main()
