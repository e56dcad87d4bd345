#!/usr/bin/env python3
"""Times one step of the optimizers that PyTorch users have, on the shapes of step_time's cases.

    peers.py --threads 2 --json peers.json 24x1024x1024x16 ...

A case is PAIRSxINxOUTxRANK. `LoRARite` of the package pytorch_optimizer follows the authors' code; torch.optim.AdamW runs
as it comes and fused.
"""

import argparse
import json
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
    "pytorch_optimizer.LoRARite": lambda parameters: LoRARite(parameters, lr=1e-4, apply_escape=True, update_skipping=0),
    "torch.optim.AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "torch.optim.AdamW(fused)": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_step(optimizer: torch.optim.Optimizer, seconds: float) -> float:
    """Microseconds; at least five steps, as many as fit into the time."""
    optimizer.step()
    wait()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        optimizer.step()
        wait()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each optimizer and case")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default %(default)s)")
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for case in arguments.cases:
        for name, make in CONTENDERS.items():
            median = median_step(make(factors(case, arguments.device)), arguments.seconds)
            print(f"{case} {name}: {median / 1e3:.2f} ms", flush=True)
            results.append({"case": case, "contender": name, "threads": arguments.threads, "median_us": median})
    with open(arguments.json, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
