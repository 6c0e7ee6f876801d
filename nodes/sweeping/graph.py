"""A sweep as a graph of stock nodes, one chain per image.

Every node's id and inputs follow from what it does (strength, seed, adapter), never from its
position in the sweep, and its other inputs are links into the user's own graph. ComfyUI's cache
therefore recognises each image when the sweep around it changes, and the image at strength 0 is
the one the graph makes without the LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...lora_core.sweep.cells import Cell, build_label
from .. import host
from ..patching.application import AUTO


@dataclass(frozen=True)
class Sampling:
    """How each image is made, once its model and seed are known."""

    links: Mapping[str, host.Link]
    """positive, latent_image and, where connected, negative, vae, sampler, sigmas."""
    settings: Mapping[str, Any]
    """steps, cfg, sampler_name, scheduler, denoise."""


@dataclass(frozen=True)
class Chain:
    """The links to one cell's outputs; None for those it does not have."""

    model: host.Link
    report: host.Link | None
    latent: host.Link | None
    image: host.Link | None


class SweepGraph:
    """Builds the chains; `adapters` maps the adapters' names to links, or to files by name.

    Args:
        mode: mode of the Apply nodes.
    """

    def __init__(self, model: host.Link, adapters: Mapping[str, host.Link | str], mode: str = AUTO):
        self.graph = host.build_graph()
        self.model = model
        self.adapters = adapters
        #: File name -> the report of its Load node.
        self.loads: dict[str, host.Link] = {}
        #: Only if it differs from Apply's default, so that cached cells are recognised.
        self.more = {} if mode == AUTO else {"mode": mode}

    def add_cell(self, cell: Cell, sampling: Sampling | None) -> Chain:
        model, report = self.add_model(cell)
        if sampling is None:
            return Chain(model, report, None, None)
        latent = self.add_sampler(cell, model, sampling)
        vae = sampling.links.get("vae")
        image = None
        if vae is not None:
            id = f"decode {build_label(cell)}"
            image = self.graph.node("VAEDecode", id, samples=latent, vae=vae).out(0)
        return Chain(model, report, latent, image)

    def add_model(self, cell: Cell) -> tuple[host.Link, host.Link | None]:
        if cell.strength == 0:
            return self.model, None
        name = cell.adapter or next(iter(self.adapters))
        adapter = self.adapters[name]
        if isinstance(adapter, str):
            load = self.graph.node("QwenEditLoraLoad", f"load {name}", lora_name=adapter)
            adapter, self.loads[name] = load.out(0), load.out(2)
        apply = self.graph.node(
            "QwenEditLoraApply",
            f"apply {name} {cell.strength!r}",
            model=self.model,
            adapter=adapter,
            strength=cell.strength,
            **self.more,
        )
        return apply.out(0), apply.out(1)

    def add_sampler(self, cell: Cell, model: host.Link, sampling: Sampling) -> host.Link:
        label, links = build_label(cell), sampling.links
        if "sampler" not in links:
            inputs: dict[str, Any] = {
                name: links[name] for name in ("positive", "negative", "latent_image")
            }
            inputs |= {"model": model, "seed": cell.seed, **sampling.settings}
            return self.graph.node("KSampler", f"sample {label}", **inputs).out(0)
        if "negative" in links:
            guider = self.graph.node(
                "CFGGuider",
                f"guide {label}",
                model=model,
                positive=links["positive"],
                negative=links["negative"],
                cfg=sampling.settings["cfg"],
            )
        else:
            guider = self.graph.node(
                "BasicGuider", f"guide {label}", model=model, conditioning=links["positive"]
            )
        noise = self.graph.node("RandomNoise", f"noise {cell.seed}", noise_seed=cell.seed)
        sampler = self.graph.node(
            "SamplerCustomAdvanced",
            f"sample {label}",
            noise=noise.out(0),
            guider=guider.out(0),
            sampler=links["sampler"],
            sigmas=links["sigmas"],
            latent_image=links["latent_image"],
        )
        return sampler.out(0)

    def collect(self, cells: Sequence[Cell], chains: Sequence[Chain], text: str) -> Any:
        """The last node, with lists of all images, latents and models, and the report."""
        inputs: dict[str, Any] = {
            f"model_{index}": chain.model for index, chain in enumerate(chains)
        }
        # ComfyUI runs inputs in reverse order, both of names and within a name. So: all latents
        # before the first image, so that the models swap in memory only once, and one adapter's
        # cells after another's.
        order = sorted(range(len(cells)), key=lambda index: self.find_adapter(cells[index]))
        for part in ("image", "latent"):
            links = {f"{part}_{i}": getattr(chains[i], part) for i in reversed(order)}
            inputs |= {name: link for name, link in links.items() if link is not None}
        inputs |= {f"report_{i}": report for i, report in self.choose_reports(cells, chains)}
        for index, (name, report) in enumerate(self.loads.items()):
            inputs |= {f"load_{index}": report, f"name_{index}": name}
        return self.graph.node("QwenEditLoraSweepCollect", "collect", text=text, **inputs)

    def find_adapter(self, cell: Cell) -> int:
        """Its index in the rendering order; strength 0, which has none, comes first."""
        if cell.strength == 0:
            return -1
        return list(self.adapters).index(cell.adapter) if cell.adapter else 0

    def choose_reports(
        self, cells: Sequence[Cell], chains: Sequence[Chain]
    ) -> list[tuple[int, host.Link]]:
        """One report of Apply per adapter, as they differ in the strength only."""
        first: dict[str, tuple[int, host.Link]] = {}
        for index, (cell, chain) in enumerate(zip(cells, chains, strict=True)):
            if chain.report is not None:
                first.setdefault(cell.adapter, (index, chain.report))
        return list(first.values())
