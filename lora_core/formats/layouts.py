"""How the MLP of a family is written that base models store in two ways: split or fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..adapter.adapter import Adapter
from ..adapter.weights import ModuleWeights
from ..base_model.families import FAMILIES, list_members
from ..base_model.family import Family
from ..base_model.module_paths import split_path
from ..errors import ConfigError
from ..text import shorten
from .fusing import fuse_weights, separate_ranks

SPLIT, FUSED = "split", "fused"
MLP_LAYOUTS = (SPLIT, FUSED)


def arrange_mlp(adapter: Adapter, mlp_layout: str | None) -> Adapter:
    """The adapter with its MLP in the layout, by default split; the same one if nothing changes.

    Raises:
        ConfigError: no such layout, the family has only one, or a module has no exact fused form.
    """
    if mlp_layout not in (None, *MLP_LAYOUTS):
        raise ConfigError(
            "unknown mlp_layout {mlp_layout!r}; expected one of {mlp_layouts}",
            mlp_layout=mlp_layout,
            mlp_layouts=", ".join(MLP_LAYOUTS),
        )
    family = adapter.base_family
    if family is None or family.mlp_fusion is None:
        if mlp_layout == FUSED and family is not None:
            both = " and ".join(one.title for one in FAMILIES if one.mlp_fusion)
            raise ConfigError(
                "{adapter} is for {title}, whose MLP has one layout only; mlp_layout fused is "
                "for {both}",
                adapter=shorten(adapter.name),
                title=family.title,
                both=both,
            )
        return adapter
    groups = group_members(adapter.modules, family, family.mlp_fusion)
    if not groups:
        return adapter
    arrange = fuse_groups if mlp_layout == FUSED else separate_groups
    return replace(adapter, modules=arrange(adapter, groups))


Groups = Mapping[str, list[ModuleWeights | None]]
"""Path of a fused module -> its members, None for those that the adapter lacks."""


def group_members(modules: Mapping[str, ModuleWeights], family: Family, fusion: str) -> Groups:
    names = family.fused[fusion].members
    found = (split_path(path) for path in modules)
    blocks = dict.fromkeys(block for block, name in found if name in names and block is not None)
    paths = [f"transformer_blocks.{block}.{fusion}" for block in blocks]
    return {path: [modules.get(member) for member in list_members(path)] for path in paths}


def fuse_groups(adapter: Adapter, groups: Groups) -> dict[str, ModuleWeights]:
    """Every group in one module, where its first member was."""
    of_member = {member: path for path in groups for member in list_members(path)}
    modules: dict[str, ModuleWeights] = {}
    for path, weights in adapter.modules.items():
        fused = of_member.get(path)
        if fused is None:
            modules[path] = weights
        elif fused not in modules:
            try:
                modules[fused] = fuse_weights(groups[fused])
            except ConfigError as e:
                raise ConfigError(
                    "{fused} has no exact fused form: {error}. Write it with mlp_layout split.",
                    fused=fused,
                    error=e,
                ) from None
    return modules


def separate_groups(adapter: Adapter, groups: Groups) -> dict[str, ModuleWeights]:
    """Every member without the columns that an exact fusion gave it for the others."""
    modules = dict(adapter.modules)
    for path, members in groups.items():
        present = [weights for weights in members if weights is not None]
        separated = separate_ranks(present) if len(present) == len(members) else None
        if separated is not None:
            modules.update(zip(list_members(path), separated, strict=True))
    return modules
