"""Writes the golden trajectories beside this file: what the existing PyTorch LoRA-RITE does.

Run by hand; the JSON files are committed. Versions that wrote them:

    python -m venv venv && venv/bin/pip install torch==2.13.0 numpy pytorch_optimizer==4.1.0
    venv/bin/python tests/golden/generate.py

Everything is float64. `update_skipping` is 0 in every case: its default, 1, silently replaces the
unmagnified gradient of a factor by zero when its RMS is above 1, so that the factor just stops. That
is no part of the algorithm, and the library has no such option.

The loss of a pair is ½‖weight ∘ (X_B X_Aᵀ − target)‖² with X_A [in, r] and X_B [out, r], the tall
forms of the factors: the rank dimension moved to the end, all others flattened. Its gradients are

    E = weight² ∘ (X_B X_Aᵀ − target),   G_A = Eᵀ X_B,   G_B = E X_A,

which a test computes from the stored numbers at its own parameters.
"""

import json
from pathlib import Path

import torch
from pytorch_optimizer.optimizer.lora_rite import LoRARite

STEPS = 30
CHECKPOINTS = (1, 2, 3, 5, 10, 20, 30)

# name -> shapes of (A, B) per pair, what differs from the reference defaults, and the start.
CASES = {
    "default": {"pairs": [((3, 8), (6, 3))]},
    "escape": {"pairs": [((3, 8), (6, 3))], "options": {"escape": True}},
    "clip_off": {"pairs": [((3, 8), (6, 3))], "options": {"clip_unmagnified_norm": 0.0}},
    "clip_off_escape": {
        "pairs": [((4, 9), (7, 4))],
        "options": {"clip_unmagnified_norm": 0.0, "escape": True, "betas": [0.8, 0.9]},
    },
    "weight_decay": {"pairs": [((3, 8), (6, 3))], "options": {"weight_decay": 0.7}},
    "from_zero": {"pairs": [((3, 8), (6, 3))], "zero_b": True},
    "two_shapes": {"pairs": [((2, 9), (5, 2)), ((4, 6), (8, 4))]},
    "convolution": {"pairs": [((2, 3, 2, 2), (5, 2, 1, 1)), ((2, 2, 1, 3), (4, 2, 1, 2))]},
    "update_capping": {"pairs": [((3, 8), (6, 3))], "options": {"max_update_rms": 0.4}},
    "maximize": {"pairs": [((3, 8), (6, 3))], "options": {"maximize": True}},
    "everything": {
        "pairs": [((1, 5), (4, 1)), ((3, 7), (6, 3))],
        "options": {
            "escape": True,
            "weight_decay": 0.3,
            "max_update_rms": 0.6,
            "betas": [0.7, 0.95],
            "clip_unmagnified_norm": 2.0,
            "eps": 1e-4,
        },
        "zero_b": True,
    },
}

DEFAULTS = {
    "lr": 0.02,
    "betas": [0.9, 0.999],
    "eps": 1e-6,
    "escape": False,
    "clip_unmagnified_norm": 1.0,
    "weight_decay": 0.0,
    "max_update_rms": 0.0,
    "maximize": False,
}


def tall(tensor, rank_dimension):
    """The rank dimension last, all others flattened: [n, r]."""
    moved = torch.moveaxis(tensor, rank_dimension, -1)
    return moved.reshape(-1, moved.shape[-1])


def loss(a, b, weight, target):
    product = tall(b, 1) @ tall(a, 0).T
    return 0.5 * (weight * (product - target)).pow(2).sum()


def numbers(tensor):
    """Row-major, with all 17 digits."""
    return [float(f"{value:.17g}") for value in tensor.detach().flatten().tolist()]


def trajectory(name, case):
    options = {**DEFAULTS, **case.get("options", {})}
    generator = torch.Generator().manual_seed(2025)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    pairs = []
    for a_shape, b_shape in case["pairs"]:
        a = normal(*a_shape).requires_grad_()
        b = torch.zeros(b_shape, dtype=torch.float64) if case.get("zero_b") else normal(*b_shape)
        b.requires_grad_()
        shape = (tall(b, 1).shape[0], tall(a, 0).shape[0])
        weight = 0.25 + normal(*shape).abs()
        target = 2 * normal(*shape)
        pairs.append((a, b, weight, target))

    optimizer = LoRARite(
        [factor for a, b, _, _ in pairs for factor in (a, b)],
        lr=options["lr"],
        betas=tuple(options["betas"]),
        eps=options["eps"],
        clip_unmagnified_grad=options["clip_unmagnified_norm"],
        update_capping=options["max_update_rms"],
        update_skipping=0.0,
        weight_decay=options["weight_decay"],
        apply_escape=options["escape"],
        lora_l_dim=0,
        lora_r_dim=1,
        maximize=options["maximize"],
    )
    result = {
        "case": name,
        "options": options,
        "pairs": [
            {
                "a_shape": list(a.shape),
                "b_shape": list(b.shape),
                "a": numbers(a),
                "b": numbers(b),
                "weight": numbers(weight),
                "target": numbers(target),
            }
            for a, b, weight, target in pairs
        ],
        "checkpoints": [],
    }
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        sum(loss(*pair) for pair in pairs).backward()
        optimizer.step()
        if step in CHECKPOINTS:
            factors = [{"a": numbers(a), "b": numbers(b)} for a, b, _, _ in pairs]
            result["checkpoints"].append({"step": step, "pairs": factors})
    return result


def main():
    torch.set_num_threads(1)
    for name, case in CASES.items():
        path = Path(__file__).parent / f"{name}.json"
        path.write_text(json.dumps(trajectory(name, case), separators=(",", ":")) + "\n")
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
