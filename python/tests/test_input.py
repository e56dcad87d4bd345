"""What the optimizer takes: modules, named parameters, pairs, groups, experts."""

import copy
import pickle
import unittest

import torch
from torch import nn

import toy
from lora_rite import FactorPair, LoraRite, find_factor_pairs


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

    def test_a_group_that_is_refused_leaves_nothing(self):
        net = toy.model()
        optimizer = LoraRite(net[0], lr=1e-2)
        group = {"params": nn.ModuleList([net[2], net[3]]), "lr": 1e-3}
        for wrong, words in (({"others": {"lr": -3.0}}, "lr is -3"), ({"lr_ratio_b": 0.0}, "lr_ratio_b is 0")):
            with self.assertRaisesRegex(ValueError, words):
                optimizer.add_param_group({**group, **wrong})
            self.assertEqual(len(optimizer.param_groups), 1)
        optimizer.add_param_group(group)
        start = toy.trained(net)
        toy.train(net, optimizer, 2)
        self.assertTrue(toy.moved(start, toy.trained(net)))
        with self.assertRaisesRegex(ValueError, "1.weight' is in another group already"):
            optimizer.add_param_group({"params": nn.ModuleList([toy.LoraLinear(4, 4, 2), net[3]])})
        self.assertEqual(len(optimizer.param_groups), 3)

    def test_wrappers_of_a_model_change_no_name(self):
        net = toy.model()
        names = [pair.name for pair in find_factor_pairs(net)]
        self.assertEqual(names, ["0.default.weight", "2.default.weight"])
        self.assertEqual([pair.name for pair in find_factor_pairs(torch.compile(net))], names)
        self.assertEqual([pair.name for pair in find_factor_pairs(nn.DataParallel(net))], names)
        self.assertEqual([pair.name for pair in find_factor_pairs(torch.compile(nn.DataParallel(net)))], names)
        self.assertEqual([pair.name for pair in find_factor_pairs(nn.DataParallel(torch.compile(net)))], names)

    def test_a_state_of_a_compiled_models_list_of_names_loads_into_one_of_its_module(self):
        net = toy.model()
        optimizer = LoraRite(list(torch.compile(net).named_parameters()), lr=1e-2)
        self.assertEqual(optimizer.param_groups[1]["param_names"], ["3.weight", "3.bias"])
        toy.train(net, optimizer, 2)
        other_net = copy.deepcopy(net)
        other = LoraRite(other_net, lr=1.0)
        other.load_state_dict(optimizer.state_dict())
        self.assertEqual(toy.train(net, optimizer, 2, first=2), toy.train(other_net, other, 2, first=2))

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


if __name__ == "__main__":
    unittest.main()
