"""Writes grad_scaler.json beside this file: trajectories of torch.amp.GradScaler on the CPU.

Run by hand; the file is committed. The version that wrote it:

    python -m venv venv
    venv/bin/pip install torch==2.13.0 numpy
    venv/bin/python tests/golden/generate_grad_scaler.py

Two optimizers share a scaler. The loss is Σ w·g with given g, so the scaled gradient is g times the scale; where it is
to overflow, one g is as large as a float can be.
"""

import json
from pathlib import Path

import torch

STEPS = 16
SHAPES = ((2, 3), (3,))
LARGEST = torch.finfo(torch.float32).max
CLIP = 0.5

# overflow: step -> which optimizers' gradients; clip: steps with unscale_ and a clip for both; new_scale: step ->
# scale.
CASES = {
    "defaults": {
        "arguments": {"init_scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        "size": 1.0,
        "overflow": {0: [0, 1], 5: [1]},
        "clip": [3, 9],
        "new_scale": {},
    },
    "short_interval": {
        "arguments": {"init_scale": 16.0, "growth_factor": 1.5, "backoff_factor": 0.25, "growth_interval": 3},
        "size": 1.0,
        "overflow": {2: [0], 7: [0], 8: [1]},
        "clip": [1, 7, 12],
        "new_scale": {10: 4096.0},
    },
    "end_of_float": {
        "arguments": {"init_scale": 1e30, "growth_factor": 1e4, "backoff_factor": 0.5, "growth_interval": 1},
        "size": 1e-3,
        "overflow": {9: [1]},
        "clip": [4],
        "new_scale": {12: 1e-30},
    },
}


def main() -> None:
    generator = torch.Generator().manual_seed(2026)
    result = {}
    for name, case in CASES.items():
        start = [torch.randn(shape, generator=generator) for shape in SHAPES]
        parameters = [torch.nn.Parameter(x.clone()) for x in start]
        optimizers = [torch.optim.SGD(parameters[:1], lr=0.1, momentum=0.9), torch.optim.Adam(parameters[1:], lr=0.01)]
        scaler = torch.amp.GradScaler(device="cpu", **case["arguments"])
        steps = []
        for step in range(STEPS):
            gradients = [case["size"] * torch.randn(shape, generator=generator) for shape in SHAPES]
            for place in case["overflow"].get(step, []):
                gradients[place].view(-1)[1] = LARGEST
            loss = sum((w * g).sum() for w, g in zip(parameters, gradients))
            scaler.scale(loss).backward()
            for place, optimizer in enumerate(optimizers):
                if step in case["clip"]:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(parameters[place], CLIP)
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update(case["new_scale"].get(step))
            steps.append(
                {
                    "gradients": [g.flatten().tolist() for g in gradients],
                    "clip": CLIP if step in case["clip"] else 0,
                    "new_scale": case["new_scale"].get(step, 0),
                    "scale": scaler.get_scale(),
                    "growth_tracker": scaler.state_dict()["_growth_tracker"],
                    "parameters": [w.detach().flatten().tolist() for w in parameters],
                }
            )
        result[name] = {"arguments": case["arguments"], "start": [x.flatten().tolist() for x in start], "steps": steps}
    with open(Path(__file__).with_name("grad_scaler.json"), "w", encoding="utf-8") as file:
        json.dump(result, file)
        file.write("\n")


if __name__ == "__main__":
    main()
