"""The experiments: models, tasks, optimizers and settings. Where each comes from is said in docs/reproducing.md."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Model:
    title: str
    fields: dict[str, object]  # of config.json
    targets: str  # layers with adapters


# Adapters on what the authors' recipe for Gemma names; the others' are the like.
GEMMA_TARGETS = "q_proj,k_proj,v_proj,up_proj,down_proj"
MODELS = {
    "gemma-2b": Model("Gemma 2B", {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18}, GEMMA_TARGETS),
    "gemma-7b": Model("Gemma 7B", {"model_type": "gemma", "hidden_size": 3072, "num_hidden_layers": 28}, GEMMA_TARGETS),
    "mt5-xxl": Model("mT5-XXL", {"model_type": "mt5", "d_model": 4096, "num_layers": 24}, "q,k,v,wi_1,wo"),
    "smollm2-135m": Model(
        "SmolLM2-135M", {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30}, GEMMA_TARGETS
    ),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned from one set of records, and what is asked about it then."""

    form: str  # of prepare_tasks.py
    source: str  # what the data set is called, and the folder in DATA
    train: tuple[str, ...]
    tests: dict[str, str]  # their files by their names
    validation: str | None  # None: held out from the training data
    measures: tuple[str, ...]  # choices: which is the likeliest; texts: what the model writes
    scores: tuple[str, ...]
    generate: int = 0  # tokens to write

    def files(self) -> list[str]:
        return [*self.train, *self.tests.values(), *([self.validation] if self.validation else [])]


def choices(form: str, source: str, name: str, train: str, test: str, validation: str | None) -> Task:
    return Task(form, source, (train,), {name: test}, validation, ("choices",), ("acc_norm", "acc"))


PAPER_TASKS = {
    "super_ni": Task(
        "super_ni",
        "natural-instructions",
        ("splits/default/train_tasks.txt",),
        {"super_ni": "splits/default/test_tasks.txt"},
        None,
        ("texts",),
        ("rouge_l", "exact_match"),
        generate=128,
    ),
    "hellaswag": choices("hellaswag", "hellaswag", "hellaswag", "hellaswag_train.jsonl", "hellaswag_val.jsonl", None),
    "arc_challenge": choices(
        "arc",
        "arc",
        "arc_challenge",
        "ARC-Challenge-Train.jsonl",
        "ARC-Challenge-Test.jsonl",
        "ARC-Challenge-Dev.jsonl",
    ),
    "gsm8k": Task(
        "gsm8k",
        "gsm8k",
        ("train.jsonl",),
        {"gsm8k": "test.jsonl"},
        None,
        ("texts",),
        ("strict_number", "flexible_number"),
        generate=256,
    ),
    "openbookqa": choices("openbookqa", "openbookqa", "openbookqa", "train.jsonl", "test.jsonl", "dev.jsonl"),
}

# LLM-Adapters' names of the eight, in the order of the authors' tables.
COMMONSENSE = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)
MIXTURE = "commonsense_15k.json"  # what the authors train on

SOURCES = {
    "natural-instructions": "Super-NaturalInstructions 2.8: its folders tasks/ and splits/",
    "hellaswag": "HellaSwag: hellaswag_train.jsonl, hellaswag_val.jsonl (the test's answers are not public)",
    "arc": "ARC-V1-Feb2018-2: ARC-Challenge-Train.jsonl, -Dev.jsonl, -Test.jsonl",
    "gsm8k": "GSM8K: train.jsonl, test.jsonl",
    "openbookqa": "OpenBookQA-V1-Sep2018, Data/Main: train.jsonl, dev.jsonl, test.jsonl",
    "commonsense": f"LLM-Adapters' boolq.train.json, boolq.test.json, ...; or {MIXTURE} to train on (official)",
}


def commonsense(names: list[str], data: pathlib.Path) -> Task:
    """One set of records to train on, the authors' where it is there, and a test for each name."""
    whole = (data / "commonsense" / MIXTURE).is_file()
    return Task(
        "commonsense",
        "commonsense",
        (MIXTURE,) if whole else tuple(f"{name}.train.json" for name in names),
        {name: f"{name}.test.json" for name in names},
        None,
        ("choices", "texts"),
        ("acc", "first_answer"),
        generate=32,
    )


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer of finetune with options of its own, and the rates that its search begins with."""

    optimizer: str
    rates: str
    options: tuple[str, ...] = ()

    def words(self) -> list[str]:
        words = ["--optimizer", self.optimizer, *self.options]
        if self.optimizer not in ("rite", "rite-qr"):
            words += ["--max-grad-norm", "1"]  # rite bounds the unmagnified gradient by itself
        elif "--max-relative-change" not in self.options:
            words += ["--max-relative-change", "0"]  # the paper's rule, which finetune bounds by default
        return words


# The authors' rates for LoRA-RITE; the wider grid is ours.
AUTHORS_RATES = "2e-4,5e-4,1e-3"
GRID = "5e-5,1e-4,2e-4,5e-4,1e-3,2e-3"
PAPER_CONTENDERS = {
    "rite": Contender("rite", AUTHORS_RATES),
    **{name: Contender(name, GRID) for name in ("adam", "lora+", "scaled-adam", "shampoo", "lamb")},
}
OFFICIAL_CONTENDERS = {
    "rite-paper": Contender("rite", AUTHORS_RATES),
    "rite-ours": Contender("rite", AUTHORS_RATES, ("--max-relative-change", "0.3")),
    "adamw": Contender("adamw", AUTHORS_RATES),
    "lora+": Contender("lora+", "5e-5,1e-4,2e-4"),  # the rate of A; that of B is 16 times as large
    "polora": Contender("polora", "5e-3,1e-2,2e-2"),
}
# Not among those that are run unless they are named.
RITE_CODE = {"rite-code": Contender("rite", AUTHORS_RATES, ("--escape", "false"))}


@dataclasses.dataclass(frozen=True)
class Experiment:
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    contenders: dict[str, Contender]
    usual: tuple[str, ...]  # of them
    dtype: str
    loss: str  # of prepare_tasks.py: what is trained on
    held_out: int  # records, a twentieth at most, where no validation data are published
    evaluate_every: int  # steps, a tenth of all at most; 0 = a tenth


def of_the_paper(model: str) -> Experiment:
    return Experiment(
        (model,), tuple(PAPER_TASKS), PAPER_CONTENDERS, tuple(PAPER_CONTENDERS), "bfloat16", "completion", 500, 0
    )


EXPERIMENTS = {
    **{model: of_the_paper(model) for model in ("gemma-2b", "gemma-7b", "mt5-xxl")},
    "official": Experiment(
        ("gemma-2b", "smollm2-135m"),
        COMMONSENSE,
        {**OFFICIAL_CONTENDERS, **RITE_CODE},
        tuple(OFFICIAL_CONTENDERS),
        "float32",
        "text",
        120,
        80,
    ),
}

INSTANCES = 100  # of each task of Super-NaturalInstructions, as Tk-Instruct takes them
WARMUP = 100  # steps, a seventh of all at most: the authors' recipe has about 700

# The table in the authors' repository of December 2025: Gemma 2B, trained on commonsense_15k; texts that the model
# wrote, with four beams. In percent.
PUBLISHED = {
    "LoRA-RITE": dict(zip(COMMONSENSE, (62.91, 74.86, 67.50, 69.30, 62.04, 78.45, 62.29, 68.80))),
    "Adam": dict(zip(COMMONSENSE, (62.20, 75.46, 65.35, 67.38, 55.80, 76.60, 58.70, 68.00))),
}
PUBLISHED_FOR = ("official", "gemma-2b", "first_answer")  # experiment, model, score
