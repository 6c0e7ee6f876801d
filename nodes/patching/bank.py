"""The weights of a side path, one site per module of the base.

A site's weights are packed into one tensor, so that ComfyUI fetches them with one copy or one page
fault wherever it keeps them. Sites that read the same x, as q, k and v of a stream do, share one
down-product: x is larger than any LoRA weight, and reading it dominates the cost.

Legend: x (..., in) is the module's input, y (..., out) its output; S is the number of rows of
both; r = sum of the ranks of all plain LoRAs of the sites that share x.
"""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch.nn import functional as F

from ...lora_core import Adapter, LoraWeights, ModuleWeights
from .. import host
from ..host import Place
from .layouts import Layout
from .terms import Inputs, LowRankTerm, Term, list_term_types

#: Modules of one parent that read the same x: (parent, which group, which of it).
_READERS = re.compile(
    r"(?P<parent>.*\.)(?:(?P<stream>to|add)_(?P<qkv>[qkv])(?:_proj)?"
    r"|img_mlp\.(?P<mlp>gate_layer|proj))"
)
_ORDER = ("q", "k", "v", "gate_layer", "proj")


@dataclass(frozen=True, slots=True)
class Member:
    """One module of one adapter, and its place in the model."""

    entry: int
    """Which of the adapters."""
    path: str
    place: Place
    weights: ModuleWeights


class Bank(torch.nn.Module):
    """Sites of all modules that any of the adapters changes."""

    def __init__(
        self,
        contents: Iterable[tuple[Adapter, frozenset[str], Layout]],
        dtype: torch.dtype,
    ):
        super().__init__()
        contents = tuple(contents)
        by_path: dict[str, list[Member]] = defaultdict(list)
        for entry, (adapter, paths, layout) in enumerate(contents):
            for path in sorted(paths):
                place = layout.find_place(path)
                assert place is not None  # paths that the model lacks were left out
                by_path[place.module_path].append(Member(entry, path, place, adapter.modules[path]))
        self.sites: dict[str, Site] = {}
        self.products: list[DownProduct] = []
        # Nodes run in inference mode; weights created there could not take part in a backward pass.
        with torch.inference_mode(False):
            for readers in group_readers(by_path):
                sites = build_sites([by_path[path] for path in readers], dtype)
                self.sites.update(zip(readers, sites, strict=True))
                product = sites[0].product
                if len(sites) > 1 and product is not None:
                    self.products.append(product)
        self.packs = torch.nn.ModuleList(site.pack for site in self.sites.values())
        for adapter, *_ in contents:
            adapter.release()

    def forget_inputs(self) -> None:
        """Releases down-products that no site took."""
        for product in self.products:
            product.forget()


def group_readers(by_path: dict[str, list[Member]]) -> list[list[str]]:
    """Groups of module paths with the same x, in the order they run; most have one member."""
    groups: dict[tuple, list[tuple[int, str]]] = defaultdict(list)
    for path, members in by_path.items():
        widths = {m.weights.shape[1] for m in members if isinstance(m.weights, LoraWeights)}
        match = _READERS.fullmatch(path)
        if match and len(widths) == 1:
            name = match["qkv"] or match["mlp"]
            groups[(match["parent"], match["stream"], *widths)].append((_ORDER.index(name), path))
        else:
            groups[(path,)].append((0, path))
    return [[path for _, path in sorted(group)] for group in groups.values()]


def build_sites(group: list[list[Member]], dtype: torch.dtype) -> list[Site]:
    """The sites of modules with the same x; the first holds the down-factors of all."""
    group = [sorted(members, key=order_member) for members in group]
    columns = DownColumns()
    for members in group:
        for run in list_plain_runs(members):
            columns.add(run)
    product = DownProduct(len(group)) if columns.downs else None
    return [Site(members, dtype, product, index, columns) for index, members in enumerate(group)]


def order_member(member: Member) -> tuple[int, int, int]:
    return member.place.num_parts, member.place.part, member.entry


#: The plain LoRAs of one place, each with its number among the members of the site.
Run = list[tuple[int, Member]]


def list_plain_runs(members: list[Member]) -> list[Run]:
    """One run per part of the output that plain LoRAs change."""
    numbered = [(i, m) for i, m in enumerate(members) if isinstance(m.weights, LoraWeights)]
    return [list(run) for _, run in groupby(numbered, key=lambda pair: pair[1].place)]


class DownColumns:
    """Which columns of a down-product are whose.

    Runs of the same down-factors share them: a LoRA that was trained on a fused module has one
    lora_A for all parts of it.
    """

    def __init__(self) -> None:
        self.downs: list[torch.Tensor] = []
        self._starts: dict[tuple[int, ...], int] = {}

    def add(self, run: Run) -> None:
        key = self._build_key(run)
        if key not in self._starts:
            self._starts[key] = sum(map(len, self.downs))
            self.downs += [member.weights.need_part("lora_A") for _, member in run]

    def find_start(self, run: Run) -> int:
        return self._starts[self._build_key(run)]

    @staticmethod
    def _build_key(run: Run) -> tuple[int, ...]:
        return tuple(id(member.weights.parts["lora_A"]) for _, member in run)


class DownProduct:
    """x @ down.T for all sites that read the same x: computed by whichever runs first.

    Each of the others takes it once, and only for the very tensor it was computed from, so the
    order in which they run does not matter, nor whether all do.
    """

    pack: host.PackedWeights
    """That of the first site; down (r, in) is its first tensor. Holds no reference to a site."""

    def __init__(self, num_sites: int):
        self.num_sites = num_sites
        self._kept: tuple | None = None

    def take(self, site: int, x: torch.Tensor) -> torch.Tensor | None:
        """The product another site has computed from this x, (S, r), or None."""
        if self._kept is None:
            return None
        source, state, waiting, hidden = self._kept
        if source() is not x or site not in waiting or state != describe_state(x):
            return None
        waiting.discard(site)
        if not waiting:
            self._kept = None
        return hidden

    def compute(self, site: int, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, down).reshape(-1, down.shape[0])
        if self.num_sites > 1:
            waiting = set(range(self.num_sites)) - {site}
            self._kept = (weakref.ref(x), describe_state(x), waiting, hidden)
        return hidden

    def fetch_and_compute(self, site: int, x: torch.Tensor) -> torch.Tensor:
        """For a site that runs before the one whose pack has the down-factors."""
        flat, ticket = self.pack.fetch(x)
        try:
            return self.compute(site, x, self.pack.split(flat)[0])
        finally:
            self.pack.release(ticket)

    def forget(self) -> None:
        self._kept = None


def describe_state(x: torch.Tensor) -> tuple[bool, int]:
    """State that must not change until reuse: whether gradients are recorded, and x's version."""
    # Inference tensors have no version counter; a model's blocks never modify an input in place.
    return torch.is_grad_enabled(), 0 if x.is_inference() else x._version


class Site:
    """All terms added to one module's output.

    Args:
        members: in the order of their gains, by part of the output.
        product: the down-product it shares as its `index`-th site; None without plain LoRAs.
        columns: of that product; the first site holds the down-factors (r, in) of all.
    """

    def __init__(
        self,
        members: list[Member],
        dtype: torch.dtype,
        product: DownProduct | None,
        index: int,
        columns: DownColumns,
    ):
        self.members = members
        self.product, self.index = product, index
        self.interleave = members[0].place.interleave
        self.terms: list[Term] = []
        tensors: list[torch.Tensor] = []
        holds_downs = product is not None and index == 0
        if holds_downs:
            tensors.append(torch.cat([down.to(dtype) for down in columns.downs]))
        for run in list_plain_runs(members):
            segments = [(i, member.weights.rank, member.weights.scale) for i, member in run]
            ups = [member.weights.need_part("lora_B").to(dtype) for _, member in run]
            term = LowRankTerm(columns.find_start(run), segments)
            self._put(term, run[0][1].place, [torch.cat(ups, dim=1)], tensors)
        for i, member in enumerate(members):
            for kind in list_term_types(member.weights):
                own = kind(i, member.weights)
                self._put(own, member.place, kind.list_tensors(member.weights), tensors)
        self.pack = host.PackedWeights(tensors, dtype)
        if product is not None and holds_downs:
            product.pack = self.pack

    def _put(
        self, term: Term, place: Place, own: list[torch.Tensor], tensors: list[torch.Tensor]
    ) -> None:
        term.part, term.num_parts = place.part, place.num_parts
        term.slots = slice(len(tensors), len(tensors) + len(own))
        tensors += own
        self.terms.append(term)

    def add(self, y: torch.Tensor, x: torch.Tensor, gains: tuple[float, ...]) -> torch.Tensor:
        """y with all terms added, in place where no gradient needs the old y.

        y was just computed by the base and belongs to us. Weights are fetched by ComfyUI's own cast
        and released before the next fetch, so that one of its buffers is enough.
        """
        out = y.reshape(-1, y.shape[-1])
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
            out = out.clone()
        product, hidden = self.product, None
        if product is not None:
            hidden = product.take(self.index, x)
            if hidden is None and self.index != 0:
                hidden = product.fetch_and_compute(self.index, x)
        flat, ticket = self.pack.fetch(x)
        try:
            tensors = self.pack.split(flat)
            if product is not None and hidden is None:
                hidden = product.compute(self.index, x, tensors[0])
            inputs = Inputs(x, hidden, tensors, gains)
            if self.interleave == 1:
                self._add_terms(out, inputs)
            else:
                parts = out.unflatten(-1, (-1, self.interleave)).transpose(1, 2)
                straight = parts.flatten(1)
                self._add_terms(straight, inputs)
                parts.copy_(straight.view(parts.shape))
        finally:
            self.pack.release(ticket)
        return out.view(y.shape)

    def _add_terms(self, out: torch.Tensor, inputs: Inputs) -> None:
        for term in self.terms:
            part = out
            if term.num_parts > 1:
                size = out.shape[-1] // term.num_parts
                part = out.narrow(-1, term.part * size, size)
            term.add(part, inputs)
