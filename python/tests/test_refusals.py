"""What cannot be stepped is refused with a sentence."""

import unittest

import torch
from torch import nn

import toy
from lora_rite import LoraRite


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
        tied = [("head.lora_A.weight", nn.Parameter(b.T)), ("head.lora_B.weight", nn.Parameter(a.T))]
        embedding = [("embed.lora_embedding_A", a), ("embed.lora_embedding_B", b)]
        self.check(
            [*embedding, *tied], "pair 'head.weight': a tensor .* lies in the memory of another one, of pair 'embed'"
        )
        self.check([(a * 1, b)], "expected a leaf")
        self.check([("k.lora_E", a), ("k.lora_A", a), ("k.lora_B", b)], "AdaLoRA")

    def test_adapters_of_other_kinds_are_refused_by_name_alone_and_beside_pairs(self):
        for beside in (nn.Identity(), toy.model()):
            for name, kind in (("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("vera_lambda_b", "VeRA")):
                net = nn.ModuleDict({"net": beside, "other": nn.ParameterDict({name: torch.randn(2, 8)})})
                with self.subTest(name, beside=type(beside).__name__):
                    self.check(net, f"parameter 'other.{name}' is one of {kind}, .*expected adapters by LoRA")
                    self.check(list(net.named_parameters()), f"parameter 'other.{name}' is one of {kind}, ")

    def test_adapters_of_other_kinds_are_stepped_by_adamw_where_a_group_says_so_and_frozen_ones_do_not_matter(self):
        net = toy.model()
        net.hada_w1_a = nn.ParameterDict({"default": torch.randn(2, 8)})
        other = net.hada_w1_a["default"]
        named = [(name, p) for name, p in net.named_parameters() if "hada_" not in name]
        optimizer = LoraRite([{"params": named}, {"params": [("hada_w1_a.default", other)], "adamw": True}], lr=1e-2)
        other.grad, before = torch.ones_like(other), other.detach().clone()
        optimizer.step()
        self.assertTrue((other < before).all())
        other.requires_grad_(False)
        self.assertEqual(len(LoraRite(net).param_groups[1]["params"]), 2)

    def test_ordinary_names_are_no_adapters(self):
        net = toy.model()
        for name in ("road_encoder", "shadow_net", "miss_rate", "ia3", "xhada_w1_a", "alpha"):
            net.register_parameter(name, nn.Parameter(torch.ones(2)))
        net.oft_blocks = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2))))
        self.assertEqual(len(LoraRite(net).param_groups[1]["params"]), 10)

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


if __name__ == "__main__":
    unittest.main()
