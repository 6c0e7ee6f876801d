"""Images from cached prompts and references: Euler steps along the velocity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch

from ...adapter.adapter import Adapter
from ...adapter.weights import LoraWeights
from ...errors import ConfigError, ShapeError, TargetError
from ...messages import message
from ...progress import ShouldStop, track
from ...text import format_count, shorten
from ..data.batches import make_generator
from ..data.dataset import CachedDataset, collect_text
from ..data.latents import count_target_tokens, normalize
from ..objective.flow import build_sigmas
from ..objective.objective import VelocityModel


@torch.no_grad()
def sample(
    model: VelocityModel,
    dataset: CachedDataset,
    index: int,
    *,
    num_steps: int = 20,
    schedule: str = "comfyui",
    guidance: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    should_stop: ShouldStop | None = None,
) -> torch.Tensor:
    """One item's edit, from noise.

    Args:
        guidance: true classifier-free guidance against the item's empty caption; 1 is without.

    Returns:
        Normalised latents of the target's size, float32 (1, 16, H, W).

    Raises:
        ConfigError: guidance without an empty caption in the training set.
        InterruptedError: `should_stop` returned True.
    """
    info, item = dataset.items[index], dataset.load(index)
    texts = [item.text.float()]
    if guidance != 1:
        if item.text_empty is None and not dataset.has_empty_text:
            raise ConfigError(
                "guidance needs the embedding of an empty caption, which {key} lacks; cache it "
                "with the training set, or set the guidance to 1",
                key=info.key,
            )
        empty = dataset.load_empty_text() if item.text_empty is None else item.text_empty
        texts.append(empty.float())
    text, text_mask = collect_text(texts)
    text, text_mask = text.to(device), None if text_mask is None else text_mask.to(device)
    references = [
        normalize(r)[None].to(device).expand(len(texts), -1, -1, -1) for r in item.references
    ]
    x = torch.randn(1, *item.target.shape, generator=make_generator(seed, info.key)).to(device)
    sigmas = build_sigmas(num_steps, schedule, count_target_tokens(*info.target)).to(device)
    for i in track(range(num_steps), None, should_stop, message("sampling")):
        batch = x.expand(len(texts), -1, -1, -1)
        velocity = model(batch, references, text, text_mask, sigmas[i].expand(len(texts))).float()
        if guidance != 1:
            with_caption, without = velocity[:1], velocity[1:]
            velocity = without + guidance * (with_caption - without)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    return x


@contextmanager
def applied(
    transformer: torch.nn.Module, adapter: Adapter | None, strength: float = 1.0
) -> Iterator[None]:
    """Inside the block, every Linear also gives strength times the adapter's part of it.

    That is scale * lora_B(lora_A x), and the change of the bias if there is one. Without an adapter
    nothing changes.

    Raises:
        ConfigError: weights that are no plain LoRA, or an infinite strength.
        TargetError: the model has none of the adapter's modules, or not all of them.
        ShapeError: a module of the model has another shape.
        NonFiniteWeightsError: the adapter holds NaN or Inf.
    """
    if adapter is None:
        yield
        return
    if not math.isfinite(strength):
        raise ConfigError(
            "the strength is {strength}; expected a finite number such as 1.0", strength=strength
        )
    modules = dict(transformer.named_modules())
    check_fit(adapter, modules)
    handles = []
    try:
        for path, weights in adapter.modules.items():
            hook = build_hook(cast(LoraWeights, weights), strength)  # see check_fit
            handles.append(modules[path].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_fit(adapter: Adapter, modules: Mapping[str, torch.nn.Module]) -> None:
    """Raises what `applied` does if not everything in the adapter can be applied to the modules."""
    name = shorten(adapter.name)
    unknown = [path for path in adapter.modules if path not in modules]
    if unknown:
        raise TargetError(
            "{name} has {num_modules} that the model does not have, such as {unknown}; choose "
            "an adapter of this model",
            name=name,
            num_modules=format_count(len(unknown), "module"),
            unknown=unknown[0],
        )
    for path, weights in adapter.modules.items():
        if not isinstance(weights, LoraWeights):
            raise ConfigError(
                "{name} holds {weights_kind} weights at {path}; sampling here takes plain LoRAs "
                "only",
                name=name,
                weights_kind=weights.kind,
                path=path,
            )
        # By attributes: quantised Linears do not derive from torch.nn.Linear.
        shape = tuple(getattr(modules[path], side, 0) for side in ("out_features", "in_features"))
        if shape != tuple(weights.shape):
            made = " x ".join(map(str, weights.shape))
            there = (
                message("is {shape} x {columns}", shape=shape[0], columns=shape[1])
                if all(shape)
                else message("is no Linear")
            )
            raise ShapeError(
                "{name} does not fit the model: {path} {there} there, and the adapter was made "
                "for {made}; choose an adapter trained for a model of this size",
                name=name,
                path=path,
                there=there,
                made=made,
            )
    adapter.check_finite()


def build_hook(weights: LoraWeights, strength: float) -> Callable[..., torch.Tensor]:
    cached: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}

    def add(
        module: torch.nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor
    ) -> torch.Tensor:
        (x,) = inputs
        place = (x.device, out.dtype)
        if place not in cached:
            parts = (weights.lora_A, weights.lora_B, weights.bias_delta)
            cached[place] = [part.to(*place) for part in parts if part is not None]
        lora_A, lora_B, *bias_delta = cached[place]
        hidden = torch.nn.functional.linear(x.to(out.dtype), lora_A)
        out = out + strength * weights.scale * torch.nn.functional.linear(hidden, lora_B)
        return out + strength * bias_delta[0] if bias_delta else out

    return add
