"""Writes baselines.json beside this file: what other implementations of the baselines do.

Run by hand; the file is committed. Versions that wrote it:

    python -m venv venv
    venv/bin/pip install torch==2.13.0 numpy pytorch_optimizer==4.1.0
    venv/bin/pip download --no-deps -d wheels timm==1.0.31 peft==0.21.2        # only one file of each is used
    for wheel in wheels/*.whl; do venv/bin/python -m zipfile -e $wheel wheels; done
    venv/bin/python tests/golden/generate_baselines.py wheels

Everything is float64. Where an implementation goes through a shorter type (Muon's bfloat16, SOAP's float32 in its QR),
the type is replaced for the run. The gradients are drawn, the same for all, and stored with the factors at some steps.
"""

import importlib
import inspect
import json
import sys
import types
from pathlib import Path

import torch
from pytorch_optimizer.optimizer.shampoo import Shampoo
from pytorch_optimizer.optimizer.soap import SOAP

STEPS = 25
CHECKPOINTS = (1, 2, 5, 12, 25)
# Square factors: the null space of a gradient's outer product would leave SOAP's first basis to chance.
SHAPES = ((5, 5), (5, 5))


def load_file(wheels: Path, path: str, stubs: tuple[str, ...] = ()) -> types.ModuleType:
    """One file of a package, with what it imports from its own folder, but without the package's __init__."""
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(wheels.joinpath(*parts[:depth]))]
        sys.modules.setdefault(package.__name__, package)
    for name in stubs:
        stub = types.ModuleType(name)
        stub.PeftModel = object
        sys.modules[name] = stub
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


def main() -> None:
    wheels = Path(sys.argv[1])
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(2026)
    normal = lambda shape: torch.randn(shape, generator=generator)
    start = [0.5 * normal(shape) for shape in SHAPES]
    gradients = [[normal(shape) for shape in SHAPES] for _ in range(STEPS)]

    riemannian = load_file(wheels, "peft/optimizers/riemannian.py", ("peft.peft_model",))
    timm_lamb = load_file(wheels, "timm/optim/lamb.py")

    class RiemannianAdamW(torch.optim.AdamW):
        def __init__(self, factors, reg, **options):
            super().__init__(factors, **options)
            self.preconditioner = riemannian._RiemannianPreconditioner([tuple(factors)], reg=reg)

        def step(self):
            self.preconditioner.step()
            super().step()

    cases = {
        "lamb": lambda x: timm_lamb.Lamb(x, lr=0.02, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, max_grad_norm=None),
        "lamb_no_decay": lambda x: timm_lamb.Lamb(x, lr=0.02, weight_decay=0.0, max_grad_norm=None, always_adapt=True),
        "muon": lambda x: torch.optim.Muon(x, lr=0.02),
        "muon_plain": lambda x: torch.optim.Muon(
            x, lr=0.02, momentum=0.8, nesterov=False, weight_decay=0.0, ns_steps=3
        ),
        "shampoo": lambda x: Shampoo(x, lr=0.1, matrix_eps=1e-6),
        "soap": lambda x: SOAP(
            x, lr=0.02, betas=(0.95, 0.95), shampoo_beta=0.9, weight_decay=0.1, precondition_frequency=4
        ),
        "scaled_adam": lambda x: RiemannianAdamW(x, reg=1e-2, lr=0.02, weight_decay=0.1),
    }
    sources = {
        "lamb": timm_lamb.Lamb,
        "muon": torch.optim.Muon,
        "soap": SOAP,
        "shampoo": Shampoo,
        "scaled_adam": riemannian.create_riemannian_optimizer,
    }
    torch.Tensor.bfloat16 = lambda self: self.clone()
    torch.float32 = torch.float64

    result = {
        "start": [x.flatten().tolist() for x in start],
        "shapes": [list(shape) for shape in SHAPES],
        "gradients": [[g.flatten().tolist() for g in step] for step in gradients],
        "cases": {},
        "defaults": {
            name: {
                option: parameter.default
                for option, parameter in inspect.signature(source).parameters.items()
                if isinstance(parameter.default, (bool, int, float, tuple, type(None)))
            }
            for name, source in sources.items()
        },
    }
    for name, make in cases.items():
        factors = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = make(factors)
        checkpoints = {}
        for step in range(1, STEPS + 1):
            for factor, gradient in zip(factors, gradients[step - 1]):
                factor.grad = gradient.clone()
            optimizer.step()
            if step in CHECKPOINTS:
                checkpoints[str(step)] = [factor.detach().flatten().tolist() for factor in factors]
        result["cases"][name] = checkpoints
    with open(Path(__file__).with_name("baselines.json"), "w", encoding="utf-8") as file:
        json.dump(result, file)
        file.write("\n")


if __name__ == "__main__":
    main()
