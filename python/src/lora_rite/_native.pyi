from collections.abc import Sequence
from typing import Any, Callable

from torch import Tensor

__version__: str
torch_version: str
options: dict[str, Any]
adamw_options: dict[str, Any]

def factor_names() -> str: ...
def find_factor_pairs(named_parameters: list[tuple[str, Tensor]]) -> list[tuple[str, int, int, int]]: ...
def read_file(path: str) -> dict[str, Any]: ...
def kernel_name() -> str:
    """The kernels that the engine "host" runs with: "avx512", "avx2", "baseline", "plain" or "none"."""

class DoubleSteps:
    """In how many steps a product of a factor was formed in double."""

    @property
    def momentum_map(self) -> int: ...
    @property
    def gradient_map(self) -> int: ...
    @property
    def cross_product(self) -> int: ...

class FactorDiagnostics:
    """How one factor stands. Symbols are those of LoraRite's options."""

    @property
    def condition_number(self) -> float:
        """σ_max / σ_min now; infinite where the factor is rank-deficient, NaN where an element is not finite."""
    @property
    def unmagnified_gradient_norm(self) -> float:
        """‖Ḡ‖ in the last step, before the clip."""
    @property
    def escaped_mass(self) -> float:
        """ρ."""
    @property
    def effective_rank(self) -> float:
        """(tr V)² / tr V², between 1 and r; 0 before the first gradient."""
    @property
    def update_rms(self) -> float:
        """RMS of the momentum in the partner's orthonormal basis."""
    @property
    def in_double(self) -> DoubleSteps:
        """Of engine "host": in how many steps floats were not exact enough; costs time, not accuracy."""

class PairDiagnostics:
    """How one pair stands."""

    @property
    def name(self) -> str: ...
    @property
    def a(self) -> FactorDiagnostics: ...
    @property
    def b(self) -> FactorDiagnostics: ...
    @property
    def clip_factor(self) -> float:
        """By which the last step's gradients were clipped, one for all pairs of a group."""
    @property
    def skipped_steps(self) -> int: ...

class LoadReport:
    """What load_matching did, by the names of pairs; groups by AdamW are called "group 1" and so on."""

    @property
    def loaded(self) -> list[str]: ...
    @property
    def kept(self) -> list[str]:
        """Of this optimizer, not in the state: as they were."""
    @property
    def unused(self) -> list[str]:
        """Of the state, not in this optimizer."""

class Optimizer:
    def __init__(self, basis: str, defaults: dict[str, Any]) -> None: ...
    def add_pairs(self, pairs: Sequence[tuple[str, Tensor, Tensor, int]], options: dict[str, Any]) -> list[Tensor]: ...
    def add_parameters(self, parameters: list[Tensor], options: dict[str, Any], maximize: bool) -> None: ...
    def set_options(self, group: int, options: dict[str, Any]) -> None: ...
    def options_of(self, group: int) -> dict[str, Any]: ...
    def pair_names(self, group: int) -> list[str]: ...
    def step(self) -> None: ...
    def upload_rates(self) -> None: ...
    def tree(self) -> dict[str, Any]: ...
    def load_tree(self, tree: dict[str, Any]) -> None: ...
    def load_matching(
        self, tree: dict[str, Any], rename: Callable[[str], str] | None, other_parameters: bool
    ) -> LoadReport: ...
    def save_file(self, path: str) -> None: ...
    def skipped_steps(self) -> int: ...
    def diagnostics(self) -> list[PairDiagnostics]: ...
    def state_of(self, name: str) -> dict[str, dict[str, Any]] | None: ...
    def reset_state(self, name: str | None = None) -> None: ...
