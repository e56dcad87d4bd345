#!/usr/bin/env python3
"""Trains MiniLM on movie reviews from two starts that are the same model, and draws the losses: the README's picture.

    scripts/setup --demo                                    # the model and the reviews
    pip install ./python peft transformers matplotlib       # into an environment with torch
    examples/python/two_starts.py --picture two-starts.png  # some minutes on two cores

The usual start has A random and B = 0. The other one has TA, where T is a random matrix with singular values from 0.1
to 10, another T for each layer. ΔW = BA = 0 in both. Data, seeds and the classifier's head are the same, nothing is
dropped out. Each optimizer has the rate that it has in scripts/demo.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import matplotlib
import torch
import transformers
from peft import LoraConfig, get_peft_model

import lora_rite

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RATES = {"LoRA-RITE": 5e-4, "Adam": 2e-3}
INK, USUAL, OTHER = "#333333", "#0b5fa5", "#f28e2b"


def reviews(folder: pathlib.Path) -> list[tuple[int, str]]:
    """Label and text of the training sentences."""
    package = REPOSITORY / ".deps/movie-reviews/vaderSentiment-3.3.2.tar.gz"
    script = REPOSITORY / "examples/finetune/scripts/prepare_reviews.py"
    subprocess.run([sys.executable, script, package, folder], check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "train.tsv").read_text(encoding="utf-8").splitlines()
    return [(int(line.startswith("positive\t")), line.split("\t", 1)[1]) for line in lines]


def batches(examples: list[tuple[int, str]], steps: int, size: int) -> list[tuple[dict, torch.Tensor]]:
    """Batches of random sentences, the same in every run."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(REPOSITORY / ".deps/minilm")
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(steps):
        chosen = [examples[i] for i in torch.randint(len(examples), (size,), generator=generator).tolist()]
        tokens = tokenizer(
            [text for _, text in chosen], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        result.append((dict(tokens), torch.tensor([label for label, _ in chosen])))
    return result


def well_mixed(rank: int, kappa: float, generator: torch.Generator) -> torch.Tensor:
    """A random matrix of condition number kappa, whose singular values are spread around 1."""
    left, right = (
        torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.double)).Q for _ in range(2)
    )
    return left @ torch.diag(torch.logspace(-0.5, 0.5, rank, base=kappa, dtype=torch.double)) @ right


class Classifier(torch.nn.Module):
    """MiniLM with an adapter, the mean over the tokens, and a linear head."""

    def __init__(self, rank: int, kappa: float):
        super().__init__()
        torch.manual_seed(0)
        path = REPOSITORY / ".deps/minilm"
        config = transformers.AutoConfig.from_pretrained(path)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0
        base = transformers.AutoModel.from_pretrained(path, config=config, add_pooling_layer=False)
        self.encoder = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
        self.head = torch.nn.Linear(config.hidden_size, 2)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.named_parameters():
            if "lora_A" in name and kappa > 1:
                parameter.data = (well_mixed(rank, kappa, generator) @ parameter.data.double()).float()

    def forward(self, tokens: dict) -> torch.Tensor:
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


def train(optimizer: str, kappa: float, data: list, rank: int) -> list[float]:
    """The loss of every step."""
    model, rate = Classifier(rank, kappa), RATES[optimizer]
    if optimizer == "Adam":
        step = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    else:
        step = lora_rite.LoraRite(model, lr=rate, others={"lr": 1e-3})
    schedule = torch.optim.lr_scheduler.LambdaLR(step, lambda done: 1 - done / len(data))
    losses = []
    for tokens, labels in data:
        loss = torch.nn.functional.cross_entropy(model(tokens), labels)
        step.zero_grad()
        loss.backward()
        step.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def smooth(losses: list[float], width: int = 9) -> list[float]:
    """Means over the steps around each."""
    return [
        sum(part) / len(part)
        for i in range(len(losses))
        for part in [losses[max(0, i - width // 2) : i + width // 2 + 1]]
    ]


def draw(runs: dict[str, tuple[list[float], list[float]]], picture: str) -> None:
    """For each optimizer a panel with its two curves, and below it the difference between them."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "axes.edgecolor": INK,
        }
    )
    rows = {"height_ratios": [2.6, 1]}
    figure, axes = pyplot.subplots(
        2, len(runs), figsize=(10.4, 5.6), sharex=True, sharey="row", layout="constrained", gridspec_kw=rows
    )
    for column, (optimizer, (usual, other)) in enumerate(runs.items()):
        steps, above, below = range(1, len(usual) + 1), axes[0][column], axes[1][column]
        above.plot(steps, smooth(usual), color=USUAL, linewidth=1.8, zorder=3, label="usual start: A, B = 0")
        above.plot(
            steps,
            smooth(other),
            color=OTHER,
            linewidth=6,
            alpha=0.7,
            label="same model: TA, B = 0 (T general, κ = 100)",
        )
        above.set_title(f"{optimizer}, learning rate {RATES[optimizer]:g}", fontweight="bold")
        gaps = [abs(first - second) for first, second in zip(usual, other)]
        below.semilogy(steps, [max(gap, 1e-9) for gap in gaps], color=INK, linewidth=1)
        below.set_title(f"difference of the two losses: at most {max(gaps):.1g}", fontsize=10, loc="left")
        below.set_xlabel("step")
        for panel in (above, below):
            panel.grid(alpha=0.25)
    axes[0][0].set_ylabel("training loss (smoothed)")
    axes[1][0].set_ylabel("difference")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(picture, dpi=160, facecolor="white")


def main() -> None:
    """Four runs, and the picture of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="two-starts.png")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kappa", type=float, default=100, help="condition number of T")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = batches(reviews(pathlib.Path(folder)), options.steps, options.batch)
    runs = {}
    for optimizer in RATES:
        runs[optimizer] = tuple(train(optimizer, kappa, data, options.rank) for kappa in (1, options.kappa))
        usual, other = (sum(losses[-20:]) / len(losses[-20:]) for losses in runs[optimizer])
        most = max(abs(first - second) for first, second in zip(*runs[optimizer]))
        print(
            f"{optimizer}: mean loss of the last 20 steps {usual:.4f} and {other:.4f}; differences at most {most:.2g}"
        )
    draw(runs, options.picture)


if __name__ == "__main__":
    main()
