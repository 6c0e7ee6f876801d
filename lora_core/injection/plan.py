"""Which modules of a model will get a trainable LoRA, and how large that is, before anything runs.

A target is chosen by a preset of the model's family ("full"), by a name inside the blocks
("attn.to_q", in every block) or by a pattern over the whole module path, in which `*` stands for
anything, `?` for one character and `[0-9]` for one of a set ("transformer_blocks.1?.attn.*").
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from ..adapter.adapter import Adapter
from ..adapter.weights import DoraWeights, LoraWeights, ModuleWeights
from ..base_model import families, module_paths
from ..base_model.family import Family
from ..base_model.qwen_image import QWEN_IMAGE
from ..disk.file_size import compute_file_size
from ..errors import ConfigError, TargetError
from ..formats.files import build_state_dict
from ..formats.schemes import build_metadata, get_scheme
from ..messages import message
from .initialization import INITIALIZATIONS
from .layers import AnyLinear

#: Why a module of the last block is left out; shown to the user.
INERT = message("the model discards the last block's text output, so it would never get a gradient")


@dataclass(frozen=True)
class LoraSettings:
    """What to train. Wrong values raise ConfigError here, wrong patterns TargetError in the plan.

    `targets` and `exclude` are presets, names or patterns, see the module's text.
    """

    rank: int = 16
    alpha: float | None = None
    """None: the rank of each module, so that its scale is 1."""
    dropout: float = 0.0
    """Probability with which an entry of the LoRA's input is dropped in training."""
    use_rslora: bool = False
    """scale = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732) instead of alpha / rank."""
    use_dora: bool = False
    """A learned magnitude per output row (Liu et al. 2024, arXiv 2402.09353)."""
    init: str = "kaiming"
    """One of INITIALIZATIONS; see `lora_core.injection.initialization`."""
    targets: tuple[str, ...] = ("full",)
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Preset, name or pattern -> another rank for the modules it matches; the last match wins."""

    def __post_init__(self) -> None:
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(
                    "{where} is {rank!r}; expected a whole number from 1, e.g. 16",
                    where=where,
                    rank=rank,
                )
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(
                "alpha is {alpha!r}; expected a number above 0, or nothing for the rank",
                alpha=self.alpha,
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                "dropout is {dropout!r}; expected 0 to below 1, e.g. 0.05", dropout=self.dropout
            )
        if self.init not in INITIALIZATIONS:
            raise ConfigError(
                "unknown initialisation {init!r}; expected one of {initializations}",
                init=self.init,
                initializations=", ".join(INITIALIZATIONS),
            )
        if not self.targets:
            raise ConfigError('no targets are given; expected at least one, e.g. "full"')

    @property
    def is_pissa(self) -> bool:
        return self.init == "pissa"

    def compute_alpha(self, rank: int) -> float:
        """The alpha whose alpha / rank is the scale, rsLoRA's included, as stored in files."""
        alpha = float(rank if self.alpha is None else self.alpha)
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


@dataclass(frozen=True)
class Target:
    """One module that will be trained."""

    module_path: str
    in_features: int
    out_features: int
    rank: int


@dataclass(frozen=True)
class InjectionPlan:
    """What `inject` will do to a model of these shapes."""

    settings: LoraSettings
    targets: tuple[Target, ...]
    """In the order of the blocks, and inside a block of the family's table."""
    skipped: Mapping[str, str]
    """Modules that were chosen but are left out -> why."""

    @property
    def num_parameters(self) -> int:
        """Trainable ones."""
        magnitudes = sum(t.out_features for t in self.targets) if self.settings.use_dora else 0
        return magnitudes + sum(t.rank * (t.in_features + t.out_features) for t in self.targets)

    def compute_file_size(
        self,
        dtype: torch.dtype = torch.bfloat16,
        key_format: str = "comfyui",
        metadata: Mapping[str, str] | None = None,
        title: str = "adapter",
    ) -> int:
        """Bytes of the file that `write_adapter` will make of the result, header included.

        Args:
            metadata: the adapter's metadata, which goes into the file's header.
            title: the file's name without its suffix, which the header repeats.
        """
        adapter = self.build_empty_adapter(dtype, metadata)
        header = build_metadata(adapter, get_scheme(key_format), title)
        return compute_file_size(build_state_dict(adapter, key_format), header)

    def build_empty_adapter(
        self, dtype: torch.dtype, metadata: Mapping[str, str] | None = None
    ) -> Adapter:
        """The adapter that training will produce, with shapes but without data (device meta)."""
        modules: dict[str, ModuleWeights] = {}
        for target in self.targets:
            # PiSSA is exported as a plain LoRA of the original base, which takes twice the rank.
            rank = target.rank * (2 if self.settings.is_pissa else 1)
            weights: ModuleWeights
            weights = direction = LoraWeights(
                torch.empty(rank, target.in_features, dtype=dtype, device="meta"),
                torch.empty(target.out_features, rank, dtype=dtype, device="meta"),
                self.settings.compute_alpha(target.rank) * rank / target.rank,
            )
            if self.settings.use_dora:
                magnitude = torch.empty(target.out_features, dtype=dtype, device="meta")
                weights = DoraWeights(direction, magnitude)
            modules[target.module_path] = weights
        return Adapter(modules, dict(metadata or {}))


def plan_injection(model: torch.nn.Module, settings: LoraSettings) -> InjectionPlan:
    """Chooses the targets of a model; nothing is changed or allocated.

    Args:
        model: any module whose Linears are at Qwen-Image's paths (transformer_blocks.0.attn.to_q);
            whatever has `in_features` and `out_features` counts as a Linear, quantised ones too.

    Raises:
        TargetError: the model has no such module, or a preset, name or pattern matches none.
        ConfigError: PiSSA at a rank above a module's smaller side.
    """
    linears = find_linears(model)
    if not linears:
        raise TargetError(
            "the model holds none of Qwen-Image's Linears; expected paths such as "
            "transformer_blocks.0.attn.to_q, found {model}. Give the transformer itself, not a "
            "wrapper around it.",
            model=list_examples(model),
        )
    family = find_family(linears)
    chosen = {
        path
        for pattern in settings.targets
        for path in select(pattern, linears, message("target"), family)
    }
    for pattern in settings.exclude:
        chosen -= select(pattern, linears, "exclude", family)
    if not chosen:
        raise TargetError(
            "nothing is left to train: {targets} without {exclude} is empty. Exclude less.",
            targets=list_patterns(settings.targets),
            exclude=list_patterns(settings.exclude),
        )
    skipped = {path: INERT for path in find_inert(linears, family) if path in chosen}
    if len(skipped) == len(chosen):
        raise TargetError(
            "{targets} selects only {skipped}, but {inert}. Choose further modules.",
            targets=list_patterns(settings.targets),
            skipped=", ".join(skipped),
            inert=INERT,
        )
    ranks = choose_ranks(settings, linears, family)
    planned = tuple(
        Target(path, linears[path].in_features, linears[path].out_features, ranks[path])
        for path in linears
        if path in chosen and path not in skipped
    )
    check_ranks(settings, planned)
    return InjectionPlan(settings, planned, skipped)


def find_linears(model: torch.nn.Module) -> dict[str, AnyLinear]:
    """Module path -> Linear at every path that is Qwen-Image's, in the order of a plan."""
    found = {
        path: module
        for path, module in model.named_modules()
        if families.is_known(path)
        and isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
    }
    names = dict.fromkeys(n for f in families.FAMILIES for n in (*f.block_linears, *f.top_linears))
    order = {name: i for i, name in enumerate(names)}

    def get_place(path: str) -> tuple[float, int]:
        block, name = module_paths.split_path(path)
        return math.inf if block is None else block, order[name]

    return {path: found[path] for path in sorted(found, key=get_place)}


def find_family(linears: Mapping[str, AnyLinear]) -> Family:
    """The family of a model's Linears; where nothing tells, the one that training is for."""
    shapes = {path: (linear.out_features, linear.in_features) for path, linear in linears.items()}
    return families.detect_family(shapes) or QWEN_IMAGE


def find_inert(linears: Mapping[str, torch.nn.Module], family: Family) -> list[str]:
    """The last block's modules whose output the model discards (survey/trainers.md section 1.7)."""
    blocks = [block for block, _ in map(module_paths.split_path, linears) if block is not None]
    last = max(blocks, default=None)
    paths = (f"transformer_blocks.{last}.{name}" for name in family.inert_last_block)
    return [path for path in paths if path in linears]


def select(
    pattern: str, linears: Mapping[str, torch.nn.Module], role: str, family: Family
) -> set[str]:
    """The module paths that a preset, a name or a pattern matches.

    Raises:
        TargetError: it matches none; the text names the closest matches.
    """
    matches = {path for path in linears if matches_pattern(pattern, path, family)}
    if not matches:
        names = dict.fromkeys(module_paths.split_path(path)[1] for path in linears)
        known = [*family.presets, *names, *linears]
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5) or known[:3]
        raise TargetError(
            "the {role} {pattern!r} matches no module of this model; expected a preset "
            "({presets}), a module's name or a pattern with *. Did you mean {near}?",
            role=role,
            pattern=pattern,
            presets=", ".join(family.presets),
            near=", ".join(near),
        )
    return matches


def matches_pattern(pattern: str, module_path: str, family: Family) -> bool:
    """True where a preset, a name inside a block, or a pattern over the path names the module."""
    block, name = module_paths.split_path(module_path)
    if pattern in family.presets:
        return block is not None and name in family.presets[pattern]
    return fnmatchcase(module_path, pattern) or fnmatchcase(name, pattern)


def choose_ranks(
    settings: LoraSettings, linears: Mapping[str, AnyLinear], family: Family
) -> dict[str, int]:
    ranks = dict.fromkeys(linears, settings.rank)
    for pattern, rank in settings.rank_pattern.items():
        ranks.update(dict.fromkeys(select(pattern, linears, "rank_pattern", family), rank))
    return ranks


def check_ranks(settings: LoraSettings, planned: tuple[Target, ...]) -> None:
    for target in planned:
        limit = min(target.in_features, target.out_features)
        if settings.is_pissa and target.rank > limit:
            raise ConfigError(
                "{module_path} has {limit} singular values, but PiSSA is asked for rank {rank}; "
                "lower the rank or choose another initialisation.",
                module_path=target.module_path,
                limit=limit,
                rank=target.rank,
            )


def list_patterns(patterns: tuple[str, ...]) -> str:
    return ", ".join(map(repr, patterns)) or message("nothing")


def list_examples(model: torch.nn.Module) -> str:
    paths = [path for path, module in model.named_modules() if hasattr(module, "in_features")]
    more = message(" and {num_paths} more", num_paths=len(paths) - 2) if len(paths) > 2 else ""
    return ", ".join(paths[:2]) + more if paths else message("no Linear at all")
