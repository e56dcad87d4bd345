"""LoRA-RITE for PyTorch: an optimizer that trains the product of LoRA factors, not the accident of how it was split.

    optimizer = lora_rite.LoraRite(peft_model, lr=3e-4, max_relative_change=0.3)

"LoRA Done RITE" (Yen et al., ICLR 2025). The rule and the engines are those of the C++ library `lora_rite`: this
module moves tensors and options, and computes nothing.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import is_, itemgetter
from typing import Any, Callable, NamedTuple, Union

import torch
from torch import Tensor, nn

__all__ = [
    "FactorDiagnostics",
    "FactorPair",
    "LoadReport",
    "LoraRite",
    "PairDiagnostics",
    "create_lora_rite_optimizer",
    "find_factor_pairs",
    "kernel_name",
]


def _torch_misfit(built_for: str) -> ImportError:
    return ImportError(
        f"lora_rite was built for torch {built_for}, and torch {torch.__version__} is here, expected the same: build "
        "it anew (pip install --force-reinstall --no-deps ./python in a clone of its repository)"
    )


try:
    from lora_rite import _native
    from lora_rite._native import FactorDiagnostics, LoadReport, PairDiagnostics, kernel_name
except ImportError as error:  # symbols of another LibTorch
    raise _torch_misfit("of another version") from error
if _native.torch_version != ".".join(torch.__version__.split(".")[:2]):
    raise _torch_misfit(_native.torch_version)

__version__ = _native.__version__

Named = tuple[str, Tensor]
Params = Union[nn.Module, Iterable[Any]]


# --- What there is to train ----------------------------------------------------------------------------------------

_WHOLE = "a whole tensor on every process, as DistributedDataParallel keeps it: LoRA factors are small"


class FactorPair(NamedTuple):
    """The factors of a LoRA layer with ΔW = B A, in PEFT's layout: a [r, in...], b [out, r, ...].

    With `experts` E > 1 they are those of E experts, as PEFT's `target_parameters` has them: a [E r, in], b [out, r E].
    """

    name: str
    a: Tensor
    b: Tensor
    experts: int = 1


def find_factor_pairs(parameters: nn.Module | Iterable[Named]) -> list[FactorPair]:
    """The LoRA factors of a module, or among named parameters, by the names of PEFT, kohya, diffusers and others.

    Give all parameters, also those that are frozen: experts are told from a higher rank by their layer's weight.
    Raises ValueError for a factor without its partner, and where ΔW is no product of the two (AdaLoRA).
    """
    named = _named(parameters)
    found = _native.find_factor_pairs(named)
    return [FactorPair(name, named[a][1], named[b][1], experts) for name, a, b, experts in found]


def _named(parameters: nn.Module | Iterable[Named]) -> list[Named]:
    """Names and parameters, without what wrappers of a model put before the names."""
    if isinstance(parameters, nn.Module):
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in parameters.modules()):
            raise ValueError(f"the module is sharded by FullyShardedDataParallel, expected of each factor {_WHOLE}")
        while isinstance(inner := getattr(parameters, _inner_of.get(type(parameters).__name__, ""), None), nn.Module):
            parameters = inner
    named = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    return [(_plain(name), tensor) for name, tensor in named]


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


# Wrappers of a whole model, and where they keep it.
_inner_of = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}


def _check_can_be_stepped(name: str, parameter: Tensor) -> None:
    """Raises ValueError for what is no ordinary tensor."""
    kind = type(parameter).__name__
    if kind == "DTensor":
        raise ValueError(f"{name} is a DTensor (FSDP2, tensor parallel), expected {_WHOLE}")
    if kind == "FlatParameter":
        raise ValueError(f"{name} is a FlatParameter (FSDP), expected {_WHOLE}")
    if hasattr(parameter, "ds_id"):
        raise ValueError(f"{name} is sharded by DeepSpeed (ZeRO 3), expected {_WHOLE}")
    if hasattr(parameter, "__tensor_flatten__"):
        raise ValueError(f"{name} is a {kind}, expected an ordinary tensor")
    if parameter.is_meta:
        raise ValueError(f"{name} is on the device meta, expected values: build the optimizer after they are loaded")


# How parameters of PEFT's and LyCORIS' adapters of other kinds begin, and whose they are. Those with "lora" for a word
# the native module refuses.
_OTHER_KINDS = {
    "adaption_": "LLaMA-Adapter", "adamss_": "AdaMSS", "beft_": "BEFT", "boft_": "BOFT", "c3a_": "C3A", "deft_": "DEFT",
    "delora_": "DeLoRA", "fourierft_": "FourierFT", "frod_": "FRoD", "glora_": "GLoRA", "gralora_": "GraLoRA",
    "hada_": "LoHa", "hira_": "HiRA", "hra_": "HRA", "ia3_": "IA³", "lily_": "Lily", "lokr_": "LoKr",
    "miss_block": "MiSS", "oft_": "OFT", "osf_": "OSF", "peanut_": "PEANuT", "poly_router": "Poly", "psoft_": "PSOFT",
    "pvera_": "PVeRA", "randlora_": "RandLoRA", "road_theta": "RoAd", "road_alpha": "RoAd", "shadow_down": "Shadow",
    "shadow_up": "Shadow", "shira_": "SHiRA", "tinylora_": "TinyLoRA", "unilora_": "UniLoRA", "vblora_": "VB-LoRA",
    "vera_": "VeRA", "waveft_": "WaveFT",
}  # fmt: skip
# What else PEFT trains beside the factors of an adapter, and freezes where another adapter is the active one.
_of_an_adapter = re.compile(r"(?:^|\.)(?:lora_|modules_to_save\.|trainable_tokens_)").search
_of_other_kind = re.compile(rf"(?:^|\.)({'|'.join(_OTHER_KINDS)})[^.]*(?:\.[^.]*){{0,2}}$").search


def _contents(params: Params, adamw: bool) -> tuple[list[FactorPair], list[Named]]:
    """The factor pairs in what a user gives, and the parameters that AdamW is to step."""
    pairs: list[FactorPair] = []
    named: list[Named] = []
    if isinstance(params, Tensor):
        raise TypeError("params is a tensor, expected a module, named parameters or pairs (a, b)")
    for item in _named(params) if isinstance(params, nn.Module) else params:
        parts = item if isinstance(item, (tuple, list)) else ()
        kinds = [Tensor if isinstance(part, Tensor) else type(part) for part in parts]
        if kinds == [str, Tensor]:
            named.append((_plain(item[0]), item[1]))
        elif kinds == [Tensor, Tensor]:
            pairs.append(FactorPair("", *item))
        elif kinds in ([str, Tensor, Tensor], [str, Tensor, Tensor, int]):
            pairs.append(FactorPair(*item))
        elif adamw and isinstance(item, Tensor):
            named.append(("", item))
        elif isinstance(item, Tensor):
            raise ValueError(
                "params has a tensor without a name, by which its partner could be told, expected the module, "
                "module.named_parameters(), or pairs (a, b); for AdamW give {'params': [...], 'adamw': True}"
            )
        else:
            raise TypeError(f"params has a {type(item).__name__}, expected (name, parameter) or a pair (a, b)")
    if adamw and pairs:
        raise ValueError("a group by AdamW has pairs, expected parameters")
    if not adamw:
        pairs += find_factor_pairs(named)
        known = {id(factor) for pair in pairs for factor in (pair.a, pair.b)}
        others = {id(p): (n, p) for n, p in named if p.requires_grad or _of_an_adapter(n)}
        named = [other for key, other in others.items() if key not in known]
        for name, _ in named:
            if found := _of_other_kind(name):
                raise ValueError(
                    f"parameter '{name}' is one of {_OTHER_KINDS[found[1]]}, whose ΔW is no product of two factors, "
                    "expected adapters by LoRA; leave it out of params, and where it is to be trained, too, give it to "
                    "AdamW in a group of its own: {'params': [...], 'adamw': True}"
                )
    for name, a, b, _ in pairs:
        _check_can_be_stepped(f"pair '{name}': factor a", a)
        _check_can_be_stepped(f"pair '{name}': factor b", b)
    for name, parameter in named:
        _check_can_be_stepped(f"parameter '{name}'", parameter)
    return pairs, named


# --- The optimizer -------------------------------------------------------------------------------------------------

# Of pairs, and of what AdamW steps; maximize is no option of LibTorch's AdamW.
_OPTIONS = tuple(_native.options)
_ADAMW_OPTIONS = (*_native.adamw_options, "maximize")


class LoraRite(torch.optim.Optimizer):
    """LoRA-RITE for LoRA factor pairs, and AdamW for all other trainable parameters.

    A step moves ΔW = B A in the same way for every factorisation (T A, B T⁻¹) of it. A step with a gradient that is NaN
    or infinite changes nothing, and is counted (`skipped_steps`).

    Args:
        params: a module (a PEFT model, or any with factors by known names); `module.named_parameters()`; pairs (a, b)
            or `FactorPair`s; or dicts with one of these as "params" and options of their own (`add_param_group`).
        lr: learning rate η ≥ 0. Good rates lie below Adam's: start at a third of Adam's.
        betas: decay rates (β₁, β₂) of the first and second moment, each in [0, 1).
        eps: ε ≥ 0 in ((V + ρI)^{1/2} + εI)^{-1}.
        eps_root: added under the root, to the eigenvalues of V + ρI.
        preconditioner_exponent: in [0, 1/2]; 1/2 divides every direction by the root of its second moment, as in the
            paper, 0 divides all alike.
        weight_decay: decoupled weight decay λ ≥ 0: each factor shrinks by 1 − ηλ a step.
        escape: keep the second moment that leaves the partner's column space as isotropic mass.
        clip_unmagnified_norm: bound on the norm of the unmagnified gradients of all pairs together; 0 is off. It is the
            invariant form of max_grad_norm.
        max_update_rms: bound on the RMS of the momentum in the partner's orthonormal basis; 0 is off.
        max_relative_change: bound on how much a step changes a factor relative to itself; 0 is off, 0.3 a good value.
        row_equilibration: adapt from row to row as well.
        lr_ratio_b: rate of B divided by the rate of A (LoRA+); > 0.
        balance: after each step scale A and B such that their norms agree, B A unchanged.
        maximize: ascend instead of descend.
        master_weights: keep a float copy of bfloat16 and half factors, so that steps below their resolution add up.
        engine: "automatic", "device" (PyTorch's operators), "host" (loops of our own, float factors on a CPU) or "cuda"
            (kernels of our own, where the package was built with them).
        capturable: a step that a CUDA graph can record.
        others: options of AdamW for the other parameters: lr, betas, eps, weight_decay, amsgrad, maximize. By default
            lr, weight_decay and maximize are those of the pairs, and the rest AdamW's.
        basis: "polar" or "qr", the root of the Gram matrix; both give the same trajectory up to round-off.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_root: float = 0.0,
        preconditioner_exponent: float = 0.5,
        weight_decay: float = 0.0,
        escape: bool = True,
        clip_unmagnified_norm: float = 1.0,
        max_update_rms: float = 0.0,
        max_relative_change: float = 0.0,
        row_equilibration: bool = False,
        lr_ratio_b: float = 1.0,
        balance: bool = False,
        maximize: bool = False,
        master_weights: bool = False,
        engine: str = "automatic",
        capturable: bool = False,
        others: Mapping[str, Any] | None = None,
        basis: str = "polar",
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in _OPTIONS}
        self._build(basis, defaults, others or {})
        if not isinstance(params, (nn.Module, Tensor)):
            params = list(params)
        is_list_of_groups = isinstance(params, list) and bool(params) and all(isinstance(g, Mapping) for g in params)
        super().__init__(params if is_list_of_groups else [{"params": params}], defaults)  # type: ignore[arg-type]
        if not any(self._pairs):
            trained = [name for group in self.param_groups for name in group.get("param_names", ())]
            raise ValueError(
                f"params has no LoRA factors ({_native.factor_names()}) among what is trained{_listed(trained)}, "
                "expected at least one pair"
            )
        if not any(parameter.requires_grad for group in self.param_groups for parameter in group["params"]):
            raise ValueError(
                "none of the parameters requires a gradient, expected at least one (an adapter that PEFT loads is "
                "frozen unless is_trainable=True)"
            )

    def _build(self, basis: str, defaults: dict[str, Any], others: Mapping[str, Any]) -> None:
        self._basis, self._others = basis, _checked(others)
        self._native = _native.Optimizer(basis, defaults)
        # Of each group: its pairs (none if AdamW steps it), and the tensors and the options that the native one has.
        self._pairs: list[list[FactorPair]] = []
        self._params: list[list[Tensor]] = []
        self._pushed: list[tuple[Any, ...]] = []
        self._has_seen_caller = False

    # --- Groups and options ---

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the pairs in "params", and one by AdamW of what else is trainable there.

        The dict's options are those of the pairs, and its "others" those of AdamW, as the constructor's. Without pairs
        all of them are AdamW's. With "adamw": True nothing is looked for: AdamW steps all of "params".
        """
        options = dict(param_group)
        adamw, of_adamw = bool(options.pop("adamw", False)), _checked(options.pop("others", {}))
        pairs, others = _contents(options.pop("params"), adamw)
        if not pairs and not others:
            raise ValueError(f"group {len(self.param_groups)} has no trainable parameters, expected at least one")
        of_pairs = {**self.defaults, **options}
        if not pairs:
            of_adamw = {**options, **of_adamw}
        like_pairs = {name: of_pairs[name] for name in ("lr", "weight_decay", "maximize")}
        of_adamw = {**_native.adamw_options, **like_pairs, **self._others, **of_adamw}
        if others and all(name for name, _ in others):
            of_adamw["param_names"] = [name for name, _ in others]
        tensors = [parameter for _, parameter in others]
        if pairs and others:  # both or none
            trial = _native.Optimizer(self._basis, self.defaults)
            trial.add_pairs(pairs, of_pairs)
            trial.add_parameters(tensors, of_adamw, of_adamw["maximize"])
            here = {id(parameter) for params in self._params for parameter in params}
            for name, parameter in others:
                if id(parameter) in here:
                    raise ValueError(f"parameter '{name}' is in another group already, expected each once")
        if pairs:
            self._add_group(pairs, [], of_pairs)
        if others:
            self._add_group([], tensors, of_adamw)

    def _add_group(self, pairs: list[FactorPair], params: list[Tensor], options: dict[str, Any]) -> None:
        if pairs:
            params = self._native.add_pairs(pairs, options)
        else:
            self._native.add_parameters(params, options, options["maximize"])
        self.param_groups.append({"params": list(params), "adamw": not pairs, **options})
        self._pairs.append(pairs)
        self._params.append(params)
        self._pushed.append(())

    def _push(self) -> None:
        """Hands what was changed in `param_groups` to the native optimizer."""
        if len(self.param_groups) != len(self._params):
            raise ValueError(f"param_groups has {len(self.param_groups)} groups, expected {len(self._params)}")
        for index, (group, params, pushed) in enumerate(zip(self.param_groups, self._params, self._pushed)):
            if len(group["params"]) != len(params) or not all(map(is_, group["params"], params)):
                raise ValueError(
                    f"param_groups[{index}]['params'] has other tensors than were added, as DeepSpeed (ZeRO) and FSDP "
                    "put there, expected the same; build the optimizer anew, of whole tensors"
                )
            values = _values(group)
            if values != pushed:
                names = _ADAMW_OPTIONS if group["adamw"] else _OPTIONS
                self._native.set_options(index, dict(zip(names, values)))
                self._pushed[index] = values

    # --- The step ---

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step with the gradients at hand; a closure is called before, with gradients enabled, its loss returned.

        Raises ValueError, with nothing changed, for an option out of its range and for a gradient that is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._has_seen_caller:
            self._has_seen_caller = True
            _warn_of_max_grad_norm()
        self._push()
        self._native.step()
        return loss

    def upload_rates(self) -> None:
        """Hands the learning rates to the device, before a replay of a recorded step (`capturable`)."""
        self._push()
        self._native.upload_rates()

    # --- State ---

    @property
    def state(self) -> Any:  # not by parameter, as the base class has it
        """All that is remembered, as copies: tensors and plain values, as the C++ library's files hold them."""
        self._push()
        return self._native.tree()

    @state.setter
    def state(self, value: Any) -> None:  # the base class's constructor, which begins with an empty one
        if value:
            raise AttributeError("state cannot be set, expected load_state_dict")
        if self.__dict__.get("_params"):  # emptied, as one resets other optimizers
            self._native.reset_state(None)

    def __getstate__(self) -> dict[str, Any]:
        own = {"pairs": self._pairs, "basis": self._basis, "others": self._others, "tree": self.state}
        return {**own, "defaults": self.defaults, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The end of the base class's load_state_dict, and that of unpickling and copying."""
        if "tree" not in state:
            self._load(state["state"], state["param_groups"])
            return
        self._build(state["basis"], state["defaults"], state["others"])
        self.param_groups = []
        super().__setstate__({"defaults": state["defaults"]})
        for pairs, group in zip(state["pairs"], state["param_groups"]):
            options = {name: value for name, value in group.items() if name not in ("params", "adamw")}
            self._add_group(pairs, group["params"], options)
        self._load_tree(state["tree"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that torch::save of the C++ optimizer writes."""
        self._push()
        self._native.save_file(os.fspath(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes over a file of `save`, or of C++'s torch::save. Pairs are found by name; errors as load_state_dict."""
        self._load(_read(path))

    def load_matching(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        rename: Callable[[str], str] | None = None,
        other_parameters: bool = True,
    ) -> LoadReport:
        """Takes over what fits of a state_dict or a file: pairs by name, in whatever group; options stay as they are.

        `rename` gives the name here of a pair there, "" leaves it out. Raises ValueError if no pair is in both.
        """
        tree = source["state"] if isinstance(source, Mapping) else _read(source)
        _check_is_tree(tree)
        self._push()
        return self._native.load_matching(tree, rename, other_parameters)

    def _load(self, tree: dict[str, Any], groups: list[dict[str, Any]] | None = None) -> None:
        """Takes over a tree, and of param groups with it all but the parameters."""
        _check_is_tree(tree)
        groups = groups or []
        names_there = [group.get("param_names") for group in groups]
        sources = self._sources(tree, names_there)
        tree = self._in_own_order(tree, sources, names_there)
        there = [groups[source] if source < len(groups) else {} for source in sources]
        for index, group in enumerate(there):
            saved = tree.get(str(index), {})
            options = {name: type(v)(group.get(name, v)) for name, v in saved.get("options", {}).items()}
            if saved:
                tree[str(index)] = {**saved, "options": options}
        self._load_tree(tree)
        for index, group in enumerate(self.param_groups):
            own: dict[str, Any] = {name: group[name] for name in ("params", "adamw", "param_names") if name in group}
            group.update({**there[index], **self._native.options_of(index), **own})

    def _load_tree(self, tree: dict[str, Any]) -> None:
        self._native.load_tree(tree)
        if not any(entry.get("stepped") for _, entry, _ in _entries(tree)):
            self._native.reset_state()  # so that the module may still be moved and converted, as before the first step

    def _sources(self, tree: dict[str, Any], names_there: list[list[str] | None]) -> list[int]:
        """For each group the one of the state whose options it takes: its pairs', or that of the same parameters.

        Raises ValueError if pairs of one group come from groups whose options differ.
        """
        groups_of: dict[str, set[int]] = {}
        for name, _, index in _entries(tree):
            groups_of.setdefault(name, set()).add(index)
        sources = []
        for index, group in enumerate(self.param_groups):
            of_each = [groups_of.get(name, set()) for name in self._native.pair_names(index)]
            found = set.intersection(*of_each) if of_each else set()  # that have all of the pairs
            if not of_each and (own := group.get("param_names")):
                found = {i for i, there in enumerate(names_there) if there and sorted(there) == sorted(own)}
            some = sorted(set().union(*of_each))
            options = [tree[str(source)].get("options") for source in some]
            if not found and any(other != options[0] for other in options[1:]):
                raise ValueError(
                    f"pairs of group {index} are in groups {some} of the state, whose options differ, expected them in "
                    "one; load_matching takes pairs without options"
                )
            sources.append(index if index in found else min(found or some or [index]))
        return sources

    def _in_own_order(
        self, tree: dict[str, Any], sources: list[int], names_there: list[list[str] | None]
    ) -> dict[str, Any]:
        """The tree with groups, pairs and named parameters in the places that they have here."""
        there, tree, entries = tree, dict(tree), _entries(tree)
        own = [self._native.pair_names(index) for index in range(len(self._params))]
        if entries:
            _check_same("pairs", [name for name, _, _ in entries], [name for names in own for name in names])
        by_name: dict[str, list[Any]] = {name: [] for name, _, _ in entries}
        for name, entry, _ in entries:
            by_name[name].append(entry)
        for index, (names, source) in enumerate(zip(own, sources)):
            group = dict(there.get(str(source), {}))
            entries_here: list[Any] = []
            if names and entries and group.get("kind") == "factor pairs":
                entries_here = [by_name[name].pop(0) for name in names]
                group["size"] = 2 * len(names)
            elif not names and source < len(names_there):
                here, saved = self.param_groups[index].get("param_names"), names_there[source]
                if here and saved and group:
                    _check_same(f"parameters of group {index}", saved, here)
                    entries_here = [group.get(str(saved.index(name))) for name in here]
            if entries_here:
                group = {name: value for name, value in group.items() if not name.isdigit()}
                group.update({str(place): entry for place, entry in enumerate(entries_here) if entry is not None})
            if group:
                tree[str(index)] = group
        return tree

    # --- What it tells ---

    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient or a factor was not finite."""
        return self._native.skipped_steps()

    def diagnostics(self) -> list[PairDiagnostics]:
        """How every pair stands, in the order of the groups; changes nothing."""
        return self._native.diagnostics()

    def state_of(self, name: str) -> dict[str, dict[str, Any]] | None:
        """What is remembered of the factors "a" and "b" of a pair, as copies; None before its first step."""
        return self._native.state_of(name)

    def reset_state(self, name: str | None = None) -> None:
        """Forgets what is remembered of a pair, or of everything: the next step is the first one of a new optimizer."""
        self._native.reset_state(name)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            pairs = len(self._native.pair_names(index))
            what = f"{pairs} pairs" if pairs else f"{len(group['params'])} parameters by AdamW"
            lines.append(f"Parameter Group {index}: {what}")
            shown = sorted(set(group) - {"params", "param_names", "adamw"})
            lines += [f"    {name}: {group[name]}" for name in shown]
        return "\n".join([*lines, ")"])


def create_lora_rite_optimizer(model: nn.Module, *, lr: float, **options: Any) -> LoraRite:
    """LoraRite for a PEFT model, in the form of PEFT's factories (`peft.optimizers`).

    For transformers' Trainer, with an optimizer of this function: `Trainer(…, optimizers=(optimizer, None))`. Set
    `max_relative_change=0.3` where B starts at zero, as PEFT's does.
    """
    return LoraRite(model, lr, **options)


# --- Small change --------------------------------------------------------------------------------------------------

_others_of_pairs = itemgetter(*_OPTIONS[2:])
_others_of_adamw = itemgetter(*_ADAMW_OPTIONS[2:])


def _values(group: dict[str, Any]) -> tuple[Any, ...]:
    """The options in a group, in the order of their names; a copy of those that may be changed in place."""
    lr = group["lr"]
    others = (_others_of_adamw if group["adamw"] else _others_of_pairs)(group)
    return (lr.item() if isinstance(lr, Tensor) else lr, tuple(group["betas"]), *others)


def _checked(others: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of options of AdamW. Raises TypeError for those that it does not have."""
    unknown = sorted(set(others) - set(_ADAMW_OPTIONS))
    if unknown:
        raise TypeError(f"others has '{unknown[0]}', expected some of {', '.join(_ADAMW_OPTIONS)}")
    return dict(others)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tree in a file of `save`. Raises ValueError, with the file's name, for what is none."""
    try:
        return _native.read_file(os.fspath(path))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"'{os.fspath(path)}' cannot be read ({str(error).splitlines()[0]}), expected a file of LoraRite.save or "
            "of C++'s torch::save; what torch.save wrote is for load_state_dict(torch.load(path))"
        ) from error


def _check_is_tree(state: Mapping[Any, Any]) -> None:
    """Raises ValueError for a state by parameter."""
    if not all(isinstance(key, str) for key in state):
        raise ValueError("the state is that of another optimizer, expected one of LoraRite")


def _entries(tree: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], int]]:
    """Names, entries and groups of the pairs in a tree; one without a name is called by its place, as in C++."""
    entries = []
    for index in range(len(tree)):
        group = tree.get(str(index))
        if not isinstance(group, Mapping) or group.get("kind") != "factor pairs":
            continue
        for place in range(len(group)):
            entry = group.get(str(place))
            if isinstance(entry, Mapping):
                entries.append((entry.get("name") or f"pair {place} of group {index}", dict(entry), index))
    return entries


def _check_same(what: str, there: Iterable[str], here: Iterable[str]) -> None:
    """Raises ValueError unless a state has the same names as the optimizer, each as often."""
    there, here = Counter(there), Counter(here)
    for more, where in ((there - here, "not here"), (here - there, "not in the state")):
        if more:
            raise ValueError(
                f"{what}{_listed(list(more))} are {where}, expected the same in both; load_matching takes a part"
            )


def _listed(names: list[str]) -> str:
    """The first of some names, for a message."""
    return "".join(f" '{name}'" for name in names[:3]) + (f" … ({len(names)})" if len(names) > 3 else "")


def _warn_of_max_grad_norm() -> None:
    """Warns if a Trainer that clips gradients is among the callers."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = sys._getframe(1)
    while trainer is not None and frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, trainer) and caller.args.max_grad_norm:
            warnings.warn(
                f"Trainer's max_grad_norm is {caller.args.max_grad_norm}: that clip depends on how ΔW is split into "
                "factors, as LoRA-RITE does not; set it to 0: clip_unmagnified_norm bounds gradients without that",
                stacklevel=2,
            )
            return
