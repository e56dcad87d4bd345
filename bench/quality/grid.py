"""What the learning study runs: tasks, contenders, and which of them meet."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt. A regression's data come from its seed; a text task has files of its own."""

    title: str
    model: str  # regression, or a model of .deps that finetune trains
    steps: int
    arguments: tuple[str, ...] = ()
    lower: int = 0  # by how many half decades searches begin lower than a contender's `first`
    source: str = ""  # MiniLM: of prepare_reviews.py
    test_size: int = 0
    validation_size: int = 0
    search_seeds: tuple[int, ...] = (0,)
    test_seeds: tuple[int, ...] = (101, 102, 103, 104, 105)

    @property
    def is_text(self) -> bool:
        return self.model != "regression"


def regression(title: str, **settings: float) -> Task:
    arguments = [word for key, value in settings.items() for word in (f"--{key}", f"{value:g}")]
    return Task(title, "regression", 600, tuple(arguments), search_seeds=(0, 1, 2))


def language(title: str) -> Task:
    return Task(
        title,
        "smollm2",
        120,
        ("--batch", "8", "--warmup", "10"),
        lower=1,
        test_size=500,
        validation_size=300,
        test_seeds=(101, 102, 103),
    )


TASKS = {
    "isotropic": regression("regression, isotropic inputs", correlation=0, noise=0.05),
    "correlated": regression("regression, correlated inputs", correlation=1, noise=0.05),
    "noisy": regression("regression, correlated inputs, noisy labels", correlation=1, noise=1),
    "narrow": regression("regression, 64 wide, isotropic inputs", correlation=0, noise=0.05, **{"in": 64, "out": 64}),
    "wide": regression(
        "regression, 1024 wide, isotropic inputs", correlation=0, noise=0.05, **{"in": 1024, "out": 1024}
    ),
    "movies": Task("MiniLM, movie reviews", "minilm", 150, source="movies", test_size=1500, validation_size=1000),
    "amazon": Task("MiniLM, amazon reviews", "minilm", 150, source="amazon", test_size=800, validation_size=500),
    "tweets": Task("MiniLM, tweets", "minilm", 150, source="tweets", test_size=800, validation_size=500),
    "kinds": language("SmolLM2-135M, what kind of thing is this word"),
    "instructions": language("SmolLM2-135M, four instructions about words"),
}
TEXTS = ("movies", "amazon", "tweets")
REGRESSIONS = ("isotropic", "correlated", "noisy")


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer with its options, and where its search begins: rates are 10^(k/2), k from `first` on."""

    optimizer: str
    first: tuple[int, int]  # regression, text
    arguments: tuple[str, ...] = ()


CONTENDERS = {
    "rite": Contender("rite", (-6, -8)),
    "rite, bounded": Contender("rite", (-6, -8), ("--max-relative-change", "0.3")),
    "adam": Contender("adam", (-6, -7)),
    "adamw": Contender("adamw", (-6, -7)),
    "lora+": Contender("lora+", (-7, -9)),
    "scaled-adam": Contender("scaled-adam", (-6, -7)),
    "shampoo": Contender("shampoo", (-5, -6)),
    "lamb": Contender("lamb", (-4, -5)),
    "adagrad": Contender("adagrad", (-4, -5)),
    "rmsprop": Contender("rmsprop", (-6, -8)),
    "muon": Contender("muon", (-5, -6)),
    "soap": Contender("soap", (-6, -7)),
    "polora": Contender("polora", (-4, -5)),
    "lora-muon": Contender("lora-muon", (-4, -5)),
    "lora-tsd": Contender("lora-tsd", (-5, -6)),
    "altlora": Contender("altlora", (-3, -3)),
    # what LoRA-RITE's options do
    "rite, bounded by 1": Contender("rite", (-6, -8), ("--max-relative-change", "1")),
    "rite, rows": Contender("rite", (-6, -8), ("--row-equilibration", "true")),
    "rite, rows, bounded": Contender("rite", (-6, -8), ("--row-equilibration", "true", "--max-relative-change", "0.3")),
    "rite, exponent 1/4": Contender("rite", (-6, -8), ("--preconditioner-exponent", "0.25")),
    "rite, exponent 1/4, bounded": Contender(
        "rite", (-6, -8), ("--preconditioner-exponent", "0.25", "--max-relative-change", "0.3")
    ),
    "rite, exponent 0, bounded": Contender(
        "rite", (-6, -8), ("--preconditioner-exponent", "0", "--max-relative-change", "0.3")
    ),
    "rite, rows, exponent 1/4, bounded": Contender(
        "rite",
        (-6, -8),
        ("--row-equilibration", "true", "--preconditioner-exponent", "0.25", "--max-relative-change", "0.3"),
    ),
    "rite, bounded, no escape": Contender("rite", (-6, -8), ("--max-relative-change", "0.3", "--escape", "false")),
    "rite, no escape": Contender("rite", (-6, -8), ("--escape", "false")),
    "rite, no clip": Contender("rite", (-6, -8), ("--clip", "0")),
    "rite, beta2 0.99": Contender("rite", (-6, -8), ("--beta2", "0.99")),
    "rite, B 4 times faster": Contender("rite", (-7, -9), ("--lr-ratio-b", "4")),
}
USUAL = ("rite, bounded", "adam", "rite", "lora+", "adamw")
OTHERS = ("scaled-adam", "shampoo", "lamb", "adagrad", "rmsprop", "muon", "soap")
RIVALS = ("polora", "lora-muon", "lora-tsd", "altlora")  # of 2025 and 2026, all stepping pairs
RANKS = (4, 8, 16, 32, 64, 128)
OVER_RANKS = ("rite", "rite, bounded", "rite, exponent 1/4, bounded", "adam", "polora", "lora-muon")
OPTIONS = tuple(name for name in CONTENDERS if name.startswith("rite, ") and name not in USUAL)
RATES_AT_FIRST = 5
MIDDLE_RANK = 16  # whose best rate is tried at the others, in the grid of ranks


@dataclasses.dataclass(frozen=True)
class Cell:
    task: str
    rank: int = 16
    start: str = "usual"  # or lopsided


# Groups of (cells, contenders), in the order in which they are run.
GRIDS = {
    "quick": [([Cell("correlated"), Cell("correlated", start="lopsided")], USUAL)],
    "full": [
        ([Cell(task, 16, start) for task in REGRESSIONS for start in ("usual", "lopsided")], USUAL + OTHERS),
        ([Cell(task) for task in REGRESSIONS], OPTIONS),
        ([Cell(task) for task in TEXTS], USUAL),
        ([Cell(task, rank) for rank in (4, 64) for task in REGRESSIONS], USUAL + OTHERS),
        ([Cell("narrow"), Cell("wide")], ("rite", "adam", "lora+")),  # does a rate carry over?
        ([Cell(task, start="lopsided") for task in TEXTS], ("rite", "adam")),
        ([Cell("movies")], OTHERS),
        ([Cell(task, rank) for rank in (4, 64) for task in TEXTS], ("rite", "adam")),
        # the two left out were tried on regressions alone
        (
            [Cell("movies")],
            [name for name in OPTIONS if name not in ("rite, exponent 1/4", "rite, exponent 0, bounded")],
        ),
        ([Cell(task) for task in ("amazon", "tweets")], OTHERS),
        ([Cell("movies", start="lopsided")], ("rite, bounded", "lora+", "adamw")),
        ([Cell(task) for task in ("kinds", "instructions")], ("rite", "adam", "rite, bounded", "lora+")),
        # the options that were best on regressions and movies, elsewhere
        (
            [Cell(task, rank, start) for task in REGRESSIONS for rank, start in ((4, "usual"), (16, "lopsided"))],
            ("rite, exponent 1/4, bounded", "rite, exponent 0, bounded"),
        ),
        (
            [Cell(task, 64) for task in REGRESSIONS],
            ("rite, exponent 1/4, bounded", "rite, exponent 0, bounded", "rite, rows, exponent 1/4, bounded"),
        ),
        ([Cell(task) for task in ("amazon", "tweets")], ("rite, rows, bounded", "rite, rows, exponent 1/4, bounded")),
    ],
    # beside the contenders of "full", whose runs are there already
    "rivals": [
        (
            [
                Cell(task, rank, start)
                for task in REGRESSIONS
                for rank, start in ((16, "usual"), (16, "lopsided"), (4, "usual"), (64, "usual"))
            ],
            RIVALS,
        ),
        ([Cell(task) for task in TEXTS], RIVALS),
    ],
    # does one rate serve every rank, and who gets worse with more of it? The first part is an hour, the texts are many.
    "ranks": [
        ([Cell(task, rank) for rank in RANKS for task in ("correlated", "noisy")], OVER_RANKS),
        ([Cell("movies", rank) for rank in RANKS], OVER_RANKS),
    ],
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a program. Regressions are short, so one call makes the runs of all its seeds."""

    cell: Cell
    contender: str
    lr: float
    seeds: tuple[int, ...]
    split: str  # validation or test

    def keys(self) -> list[tuple]:
        return [
            (self.cell.task, self.cell.rank, self.cell.start, self.contender, self.lr, seed, self.split)
            for seed in self.seeds
        ]


def key_of(run: dict) -> tuple:
    return tuple(run[name] for name in ("task", "rank", "start", "contender", "lr", "seed", "split"))


def rate(quarter: int) -> float:
    """10^(quarter/4), with two digits, so that it reads well and compares equal."""
    return float(f"{10 ** (quarter / 4):.1e}")
