#!/usr/bin/env python3
"""Asks why some papers see LoRA-RITE collapse: its Python implementations beside this library's, in the same training.

    pip install ./python peft transformers tqdm matplotlib pytorch_optimizer==4.1.0
    git clone https://github.com/gkevinyen5418/LoRA-RITE official           # has no licence, so is no part of this
    collapse.py --official official/lora_rite.py --ranks 8,64 --rates 5e-4  # adds runs to results/collapse.jsonl
    collapse.py --table                                                     # prints what is there

Models, data, seeds, rates and schedule are the same for all; a setting is an implementation with options (SETTINGS).
For every factor and step: did it get an exactly zero update though its gradient is not zero? Of the implementations in
Python also why: `skipped` is their threshold on the RMS of the unmagnified gradient, `dropped` a gradient that their
inverse root turns into zeros. `moved` is ‖ΔW‖ of all layers: a step cannot move it by much more than rate · √(width ·
rank) unless a factor was nearly singular, as B is after a first step on fewer predicted tokens than r. A run that is in
the results is not run again.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import pathlib
import random
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from study import read_runs
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples/python"))
from peft_finetune import batches as batches_of_entries  # noqa: E402
from peft_finetune import entries  # noqa: E402
from two_starts import reviews  # noqa: E402

import lora_rite  # noqa: E402

RESULTS = ROOT / "bench/quality/results/collapse.jsonl"
Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Setting:
    """An implementation with options, and how the training loop clips gradients before it (0: not at all)."""

    implementation: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_grad_norm: float = 0.0


# As logtrainer.py of LucasXinYu/AltLoRA runs the authors' class.
ALTLORA = dict(weight_decay=0.01, update_capping=1.0, update_skipping=5.0, apply_escape=True, balance_param=True)
# The same options in this library's words. It skips nothing.
OURS_AS_OFFICIAL = dict(escape=False, eps=1e-6, eps_root=1e-12)
OURS_AS_ALTLORA = dict(weight_decay=0.01, max_update_rms=1.0, balance=True, eps=1e-6, eps_root=1e-12)

SETTINGS = {
    "AdamW": Setting("adamw"),
    "AdamW, norm 1": Setting("adamw", {}, 1.0),
    "lora_rite": Setting("ours"),
    "lora_rite, bounded": Setting("ours", dict(max_relative_change=0.3)),
    "lora_rite, eps 0": Setting("ours", dict(eps=0.0)),
    "lora_rite, official's options": Setting("ours", OURS_AS_OFFICIAL),
    "lora_rite, AltLoRA's options": Setting("ours", OURS_AS_ALTLORA),
    "lora_rite, norm 1": Setting("ours", {}, 1.0),
    "pytorch_optimizer": Setting("pytorch_optimizer"),
    "pytorch_optimizer, no skipping": Setting("pytorch_optimizer", dict(update_skipping=0.0)),
    "pytorch_optimizer, AltLoRA's options": Setting("pytorch_optimizer", ALTLORA),
    "pytorch_optimizer, norm 1": Setting("pytorch_optimizer", {}, 1.0),
    "official": Setting("official"),
    "official, escape": Setting("official", dict(apply_escape=True)),
    "official, AltLoRA's options": Setting("official", ALTLORA),
    "official, norm 1": Setting("official", {}, 1.0),
    "official, AltLoRA's options, norm 1": Setting("official", ALTLORA, 1.0),
}


def official_class(path: pathlib.Path) -> Callable[..., torch.optim.Optimizer]:
    """LoRARite of the authors' file."""
    spec = importlib.util.spec_from_file_location("official_lora_rite", path)
    assert spec and spec.loader, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRARite


def optimizer_of(
    setting: Setting, factors: list[torch.nn.Parameter], lr: float, official: pathlib.Path | None
) -> torch.optim.Optimizer:
    """For factors in alternating order, A before B. Weight decay is 0 unless the options have one."""
    if setting.implementation == "adamw":
        return torch.optim.AdamW(factors, lr=lr, weight_decay=0, **setting.options)
    if setting.implementation == "ours":
        return lora_rite.LoraRite(list(zip(factors[::2], factors[1::2])), lr=lr, **setting.options)
    if setting.implementation == "pytorch_optimizer":
        from pytorch_optimizer.optimizer.lora_rite import LoRARite

        return LoRARite(factors, lr=lr, **setting.options)
    assert official is not None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a greeting
        return official_class(official)(factors, betas=(0.9, 0.999), lr=lr, **setting.options)


class Counts:
    """Events by factor, [those of A, those of B]; steps are counted only for factors whose gradient is not zero."""

    def __init__(self, factors: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer):
        self.factors = factors
        self.gradients, self.zero, self.nonfinite = [0, 0], [0, 0], [0, 0]
        self.skipped, self.dropped, self.largest_rms = [0, 0], [0, 0], 0.0
        if helper := getattr(optimizer, "helper", None):  # of the implementations in Python, called for A, B, A, B, …
            helper.skip_update = self._watched(helper.skip_update, self.skipped, False)
            helper.get_preconditioned_update = self._watched(helper.get_preconditioned_update, self.dropped, True)

    def _watched(self, function: Callable[..., torch.Tensor], lost: list[int], is_update: bool) -> Callable[..., Any]:
        sides = itertools.cycle((0, 1))

        def watched(gradient: torch.Tensor, *rest: Any) -> torch.Tensor:
            result, side = function(gradient, *rest), next(sides)
            lost[side] += bool(gradient.any()) and not bool(result.any())
            if is_update:
                self.largest_rms = max(self.largest_rms, result.double().square().mean().sqrt().item())
            return result

        return watched

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        before = [factor.detach().clone() for factor in self.factors]
        optimizer.step()
        for index, (old, new) in enumerate(zip(before, self.factors)):
            if new.grad is not None and new.grad.any():
                self.gradients[index % 2] += 1
                self.zero[index % 2] += torch.equal(old, new)
            self.nonfinite[index % 2] += not bool(new.isfinite().all())

    def result(self) -> dict[str, Any]:
        names = ("gradients", "zero", "skipped", "dropped", "nonfinite", "largest_rms")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def moved(factors: list[torch.nn.Parameter], scale: float) -> list[float]:
    """‖ΔW‖ of every pair; it is 0 at the start."""
    pairs = [(a.double(), b.double()) for a, b in zip(factors[::2], factors[1::2])]
    return [scale * math.sqrt(max(0.0, ((b.T @ b) * (a @ a.T)).sum().item())) for a, b in pairs]


@torch.no_grad()
def loss_on(model: torch.nn.Module, data: list[Batch]) -> float:
    model.eval()
    return statistics.fmean(model(**batch).loss.item() for batch in data)


TARGETS = {"smollm2": ["q_proj", "k_proj", "v_proj"], "minilm": ["query", "key", "value"]}


def predicted(labels: torch.Tensor) -> int:
    """How many tokens, or texts, a batch's loss is the mean of."""
    return int(((labels[:, 1:] if labels.ndim == 2 else labels) >= 0).sum())


def adapted(run: dict[str, Any]) -> torch.nn.Module:
    path, alpha = ROOT / ".deps" / run["task"], run["alpha"] or run["rank"]
    torch.manual_seed(run["seed"])
    if run["task"] == "smollm2":
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=2, dtype=torch.float32, **no_dropout
        )
    config = LoraConfig(
        r=run["rank"],
        lora_alpha=alpha,
        target_modules=TARGETS[run["task"]] if run["targets"] == "qkv" else "all-linear",
        task_type="CAUSAL_LM" if run["task"] == "smollm2" else "SEQ_CLS",  # which trains the head, too
    )
    return get_peft_model(model, config).to(run["device"])


def batches_of(texts: list[Any], task: str, size: int) -> list[Batch]:
    path = ROOT / ".deps" / task
    if task == "smollm2":
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        tokenizer.eos_token = "<|im_end|>"
        return batches_of_entries(texts, tokenizer, size)
    tokenize = transformers.AutoTokenizer.from_pretrained(path)
    result = []
    for first in range(0, len(texts), size):
        part = texts[first : first + size]
        tokens = tokenize([text for _, text in part], padding=True, truncation=True, max_length=64, return_tensors="pt")
        result.append({**tokens, "labels": torch.tensor([label for label, _ in part])})
    return result


def data_of(run: dict[str, Any], wordnet: pathlib.Path) -> tuple[list[Batch], list[Batch]]:
    """Batches for training and held-out ones; the latter are the same for all seeds."""
    if run["task"] == "smollm2":
        texts: list[Any] = entries(wordnet)
    else:
        with tempfile.TemporaryDirectory() as folder:
            texts = reviews(pathlib.Path(folder))
    chosen = random.Random(run["seed"]).sample(texts[200:], run["steps"] * run["batch"])
    parts = batches_of(chosen, run["task"], run["batch"]), batches_of(texts[: run["held_out"]], run["task"], 20)
    for batch in itertools.chain(*parts):
        batch.update({name: values.to(run["device"]) for name, values in batch.items()})
        if run["task"] == "smollm2" and run["predicted"]:
            later = batch["attention_mask"].flip(1).cumsum(1).flip(1)  # of a text's tokens, this one and those behind
            batch["labels"].masked_fill_(later > run["predicted"], -100)
    return parts


SHARED = ("task", "targets", "alpha", "predicted", "steps", "batch", "held_out", "precision", "device")
KEY = (*SHARED, "setting", "rank", "lr", "seed")


def train(run: dict[str, Any], wordnet: pathlib.Path, official: pathlib.Path | None) -> dict[str, Any]:
    """Up to the end, to the first loss that is not finite, or to what the optimizer throws."""
    data, held_out = data_of(run, wordnet)
    model, setting = adapted(run), SETTINGS[run["setting"]]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = [name.partition(".lora_A")[0] for name in trainable if "lora_A" in name]
    factors = [parameter for name, parameter in trainable.items() if "lora_" in name]
    head = [parameter for name, parameter in trainable.items() if "lora_" not in name]
    optimizer = optimizer_of(setting, factors, run["lr"], official)
    optimizers = [optimizer] + ([torch.optim.AdamW(head, lr=1e-3, weight_decay=0)] if head else [])
    warm_up, steps = max(1, run["steps"] // 10), run["steps"]
    rate = lambda done: min(1.0, (done + 1) / warm_up, (steps - done) / (steps - warm_up or 1))
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    counts, before, losses, error = Counts(factors, optimizer), loss_on(model, held_out), [], ""
    model.train()
    begin = time.perf_counter()
    for batch in tqdm(data, desc=f"{run['setting']}, r = {run['rank']}, {run['lr']:g}", unit="step", leave=False):
        with torch.autocast(run["device"], torch.bfloat16, enabled=run["precision"] == "bf16"):
            loss = model(**batch).loss
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if setting.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(list(trainable.values()), setting.max_grad_norm)
        try:
            counts.step(optimizer)
        except RuntimeError as thrown:  # torch.linalg.LinAlgError is one
            error = str(thrown).splitlines()[0]
            break
        for each in optimizers[1:]:
            each.step()
        for schedule in schedules:
            schedule.step()
    seconds = time.perf_counter() - begin
    norms = moved(factors, (run["alpha"] or run["rank"]) / run["rank"])
    most = max(norms, key=lambda norm: norm if math.isfinite(norm) else math.inf)
    numbers = {"before": before, "after": loss_on(model, held_out), "moved": math.hypot(*norms), "moved_most": most}
    return {
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        **counts.result(),
        "skipped_steps": optimizer.skipped_steps() if isinstance(optimizer, lora_rite.LoraRite) else 0,
        "layer_moved_most": layers[norms.index(most)] if math.isfinite(most) else "",
        "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in losses],
        "factors": len(factors),
        "fewest_predicted": min(predicted(batch["labels"]) for batch in data),
        "error": error,
        "seconds": round(seconds, 2),
    }


def origin(official: pathlib.Path | None) -> dict[str, Any]:
    """Where and with what a run was made."""
    packages = ("torch", "transformers", "peft", "pytorch_optimizer", "lora_rite")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if official:
        versions["official"] = "sha256 " + hashlib.sha256(official.read_bytes()).hexdigest()[:12]
    machine = runpy.run_path(str(ROOT / "bench/report.py"))["machine"]()
    return {"machine": machine, "threads": torch.get_num_threads(), "versions": versions, "date": str(date.today())}


def cell(runs: list[dict[str, Any]]) -> str:
    """Loss after training, ‖ΔW‖, and of A's and B's gradients the share that changed nothing; means over seeds."""
    if not runs:
        return ""
    if broken := [run for run in runs if run["after"] is None or run["error"]]:
        return f"broke at step {len(broken[0]['losses'])}"
    lost = []
    for side in (0, 1):
        gone = sum(max(run["zero"][side], run["skipped"][side] + run["dropped"][side]) for run in runs)
        lost.append(f"{100 * gone / max(1, sum(run['gradients'][side] for run in runs)):.0f}")
    loss, norm = (statistics.fmean(run[name] for run in runs) for name in ("after", "moved"))
    return f"{loss:.3f}, {norm:.2g}, {' / '.join(lost)} %"


def tables(runs: Iterable[dict[str, Any]]) -> str:
    """One table for each rate, model and so on: settings by ranks."""
    parts: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    shared = (*SHARED, "lr")
    for run in runs:
        parts.setdefault(tuple(run[name] for name in shared), []).append(run)
    lines = []
    for key, part in sorted(parts.items()):
        ranks, before = sorted({run["rank"] for run in part}), statistics.fmean(run["before"] for run in part)
        what = ", ".join(f"{name} {value or ('r' if name == 'alpha' else 'all')}" for name, value in zip(shared, key))
        fewest = min(run["fewest_predicted"] for run in part)
        lines += [f"{what}; loss before: {before:.3f}; fewest predicted tokens in a batch: {fewest}", ""]
        lines += ["| setting | " + " | ".join(f"r = {rank}" for rank in ranks) + " |", "|---" * (1 + len(ranks)) + "|"]
        for name in SETTINGS:
            row = [cell([run for run in part if run["setting"] == name and run["rank"] == rank]) for rank in ranks]
            if any(row):
                lines.append(f"| {name} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(
        ["A cell: loss on held-out texts, ‖ΔW‖, and the share of A's / B's gradients that were lost.", "", *lines]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what the results hold, and run nothing")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--official", type=pathlib.Path, help="the authors' lora_rite.py; without it they are left out")
    parser.add_argument("--wordnet", type=pathlib.Path, default=pathlib.Path("/usr/share/wordnet"))
    parser.add_argument("--task", choices=list(TARGETS), default="smollm2")
    parser.add_argument("--targets", choices=["qkv", "all"], default="qkv", help="which layers (default %(default)s)")
    parser.add_argument("--ranks", default="4,8,16,32,64")
    parser.add_argument("--rates", default="1e-4,5e-4")
    parser.add_argument("--alpha", type=int, default=0, help="of the scale alpha / r; 0 is r (default %(default)s)")
    parser.add_argument("--settings", default=";".join(SETTINGS), help="separated by semicolons (default: all)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=100, help="texts, of 200 at most (default %(default)s)")
    parser.add_argument("--predicted", type=int, default=0, help="only so many last tokens of a text; 0 is all")
    parser.add_argument("--precision", choices=["float", "bf16"], default="float", help="bf16 is torch.autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    runs = read_runs(options.results)
    if options.table:
        print(tables(runs))
        return
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    names = options.settings.split(";")
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"--settings has '{unknown[0]}', expected some of: {'; '.join(SETTINGS)}")
    if not options.official:
        print("the settings 'official' are left out: --official is not given")
        names = [name for name in names if SETTINGS[name].implementation != "official"]
    same = {name: getattr(options, name) for name in SHARED}
    numbers = [
        [kind(value) for value in getattr(options, name).split(",")]
        for name, kind in (("seeds", int), ("rates", float), ("ranks", int))
    ]
    jobs = [
        {**same, "seed": seed, "lr": lr, "rank": rank, "setting": name}
        for seed, lr, rank, name in itertools.product(*numbers, names)
    ]
    done = {tuple(run[name] for name in KEY) for run in runs}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with open(options.results, "a", encoding="utf-8") as log:
        for job in tqdm([job for job in jobs if tuple(job[name] for name in KEY) not in done], unit="run"):
            result = {**job, **train(job, options.wordnet, options.official), **origin(options.official)}
            log.write(json.dumps(result) + "\n")
            log.flush()
            tqdm.write(f"{job['setting']}, r = {job['rank']}, {job['lr']:g}: {cell([result])}, {result['seconds']} s")


if __name__ == "__main__":
    main()
