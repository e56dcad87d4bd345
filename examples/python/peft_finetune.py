#!/usr/bin/env python3
"""Fine-tunes SmolLM2-135M with PEFT on a dictionary's entries, once by LoRA-RITE and once by AdamW.

    scripts/setup --smollm2                                # the model, and WordNet for the entries
    pip install ./python peft transformers matplotlib tqdm # into an environment with torch
    examples/python/peft_finetune.py                       # some minutes on two cores

Each optimizer starts from the usual adapter and from an equivalent one (A · 8, the same ΔW = 0). Prints a table and
draws the losses into peft_finetune.png.
"""

import argparse
import pathlib
import random
import statistics
import time

import matplotlib
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from lora_rite import create_lora_rite_optimizer

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def entries(wordnet: pathlib.Path) -> list[str]:
    """Nouns with their definitions, as "teacup: as much as a teacup will hold"."""
    result = []
    for line in (wordnet / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, definition = line.split("|", 1)
        result.append(f"{fields.split()[4].replace('_', ' ')}: {definition.split(';')[0].strip()}")
    random.Random(0).shuffle(result)
    return result


def batches(texts: list[str], tokenizer, size: int) -> list[dict[str, torch.Tensor]]:
    """Token ids, each text ended by the tokenizer's last token; padding is not to be predicted."""
    result = []
    for first in range(0, len(texts), size):
        ids = [[*tokenizer(text).input_ids[:63], tokenizer.eos_token_id] for text in texts[first : first + size]]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        labels = padded.masked_fill(mask == 0, -100)
        result.append({"input_ids": padded, "attention_mask": mask, "labels": labels})
    return result


def adapted(path: pathlib.Path, rank: int, scale: float) -> torch.nn.Module:
    """The model with an adapter of which A is `scale` times as large as usual, and B is 0."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(scale)
    return model


def train(model, optimizer, data, name: str) -> tuple[list[float], float]:
    """The losses of one pass, and the optimizer's share of the time."""
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, len(data) // 10, len(data))
    losses, stepping, begin = [], 0.0, time.perf_counter()
    model.train()
    for batch in (progress := tqdm(data, desc=name, unit="step")):
        loss = model(**batch).loss
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        stepping += time.perf_counter() - before
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{statistics.mean(losses[-10:]):.3f}")
    return losses, stepping / (time.perf_counter() - begin)


@torch.no_grad()
def loss_on(model, data) -> float:
    """Mean loss of a token."""
    model.eval()
    counts = [(batch["labels"][:, 1:] >= 0).sum().item() for batch in data]
    losses = [model(**batch).loss.item() for batch in data]
    return sum(count * loss for count, loss in zip(counts, losses)) / sum(counts)


def draw(path: str, runs: dict[str, list[float]]) -> None:
    """The losses, each the mean of ten steps."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, losses) in enumerate(runs.items()):
        means = [statistics.mean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
        color, line = ("#08519c", "#6baed6", "#a63603", "#fd8d3c")[number], ("-", "--")[number % 2]
        axes.plot(means, line, label=name, color=color)
    axes.set(xlabel="step", ylabel="loss", title="SmolLM2-135M on entries of a dictionary")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Four runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=REPOSITORY / ".deps/smollm2")
    parser.add_argument("--wordnet", type=pathlib.Path, default=pathlib.Path("/usr/share/wordnet"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rite-lr", type=float, default=5e-4)
    parser.add_argument("--adamw-lr", type=float, default=1e-3)
    parser.add_argument("--plot", default="peft_finetune.png")
    options = parser.parse_args()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(options.model / "tokenizer.json"))
    tokenizer.eos_token = "<|im_end|>"
    texts, count = entries(options.wordnet), options.steps * options.batch_size
    data = batches(texts[:count], tokenizer, options.batch_size)
    held_out = batches(texts[count:][:100], tokenizer, 20)

    optimizers = {
        "LoRA-RITE": lambda model: create_lora_rite_optimizer(model, lr=options.rite_lr),
        "AdamW": lambda model: torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=options.adamw_lr, weight_decay=0
        ),
    }
    runs, rows = {}, []
    for name, make in optimizers.items():
        for start, scale in (("usual", 1), ("A · 8", 8)):
            model = adapted(options.model, options.rank, scale)
            before = loss_on(model, held_out)
            losses, share = train(model, make(model), data, f"{name}, {start}")
            runs[f"{name}, {start} start"] = losses
            rows.append((name, start, before, loss_on(model, held_out), share))
    print("\n| optimizer | start | loss on held-out entries before | after | optimizer's share of the time |")
    print("|---|---|---|---|---|")
    for name, start, before, after, share in rows:
        print(f"| {name} | {start} | {before:.3f} | {after:.3f} | {100 * share:.1f} % |")
    draw(options.plot, runs)
    print(f"\nThe picture: {options.plot}")


if __name__ == "__main__":
    main()
