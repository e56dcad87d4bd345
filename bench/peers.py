#!/usr/bin/env python3
"""Times one step of the optimizers that PyTorch users have, on the shapes of step_time's cases.

    peers.py --threads 2 --json peers.json 24x1024x1024x16 ...

A case is PAIRSxINxOUTxRANK. `LoRARite` of the package pytorch_optimizer follows the authors' code; torch.optim.AdamW
runs as it comes, by lists of tensors and fused; lora_rite.LoraRite is this library's (python/), as it comes and its C++
alone, and left out where it is not installed. All step copies of the same tensors by turns, in another order every
round: who comes before leaves more or less in the caches.
"""

import argparse
import importlib.util
import json
import random
import statistics
import time

import torch
from pytorch_optimizer.optimizer.lora_rite import LoRARite


def factors(case: str, device: str) -> list[torch.nn.Parameter]:
    pairs, width_in, width_out, rank = map(int, case.split("x"))
    torch.manual_seed(0)
    result = []
    for _ in range(pairs):
        for shape in ((rank, width_in), (width_out, rank)):
            factor = torch.nn.Parameter(0.02 * torch.randn(shape, device=device))
            factor.grad = 1e-3 * torch.randn(shape, device=device)
            result.append(factor)
    return result


CONTENDERS = {
    "pytorch_optimizer.LoRARite": lambda parameters: LoRARite(
        parameters, lr=1e-4, apply_escape=True, update_skipping=0
    ),
    "torch.optim.AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "torch.optim.AdamW(foreach)": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, foreach=True),
    "torch.optim.AdamW(fused)": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
}
if importlib.util.find_spec("lora_rite"):
    import lora_rite

    ours = lambda factors: lora_rite.LoraRite(list(zip(factors[::2], factors[1::2])), lr=1e-4)
    CONTENDERS["lora_rite.LoraRite"] = ours
    CONTENDERS["lora_rite.LoraRite(C++)"] = lambda factors: ours(factors)._native
else:
    print("lora_rite.LoraRite is left out: the package is not installed (pip install ./python)")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_steps(optimizers: dict[str, torch.optim.Optimizer], seconds: float) -> dict[str, float]:
    """Microseconds; at least five rounds, as many as fit into the time."""
    times = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        optimizer.step()
    end = time.perf_counter() + seconds
    order, shuffle = list(optimizers.items()), random.Random(0).shuffle
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < end:
        shuffle(order)
        for name, optimizer in order:
            wait()
            start = time.perf_counter()
            optimizer.step()
            wait()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6, help="for each case")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default %(default)s)")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for case in arguments.cases:
        optimizers = {name: make(factors(case, arguments.device)) for name, make in CONTENDERS.items()}
        for name, median in median_steps(optimizers, arguments.seconds).items():
            print(f"{case} {name}: {median / 1e3:.2f} ms", flush=True)
            results.append({"case": case, "contender": name, "threads": arguments.threads, "median_us": median})
    with open(arguments.json, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
