"""Trainable LoRAs in a model: injected, trained, exported as an `Adapter`, ejected.

    plan = plan_injection(model, LoraSettings(rank=16, targets=("attention",)))
    injection = inject(model, plan)
    optimizer = build_optimizer("adamw", injection.parameters(), lr=1e-4)
    ...
    write_adapter(injection.build_adapter("my edit"), "my_edit.safetensors")
    injection.eject()

The layers are our own rather than PEFT's: same numbers (`tests/lora_core/injection/test_inject.py`
takes PEFT as oracle), fewer passes over the tokens (`lora_core.injection.layers` says which, and
`benchmarks/injection.py` measures them), quantised bases of any kind, and a base that stays
bit-identical even with PiSSA.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.delta import upcast
from ..adapter.weights import DoraWeights, LoraWeights, ModuleWeights
from ..base_model.module_paths import split_path
from ..errors import ConfigError, ShapeError, TargetError
from ..messages import message
from ..progress import Progress, ShouldStop, track
from ..text import format_count, shorten_list
from .initialization import compute_principal_factors, draw_down, make_generator
from .layers import DoraLinear, LoraLinear, SharedInput, get_base_weight
from .plan import (
    InjectionPlan,
    LoraSettings,
    Target,
    list_patterns,
    plan_injection,
)

__all__ = ["Injection", "InjectionPlan", "LoraSettings", "inject", "plan_injection"]

#: Modules of one block that the model gives the same tensor.
SHARED_INPUTS = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
#: State of one layer: names of its tensors, without those it lacks.
PARTS = ("lora_A", "lora_B", "magnitude", "frozen_A", "frozen_B")


class Injection:
    """The LoRAs inside a model, by module path. Made by `inject`."""

    def __init__(self, model: nn.Module, plan: InjectionPlan, layers: Mapping[str, LoraLinear]):
        self.model = model
        self.plan = plan
        self.layers = dict(layers)
        self._required_grad = {p for p in model.parameters() if p.requires_grad}
        model.requires_grad_(False)
        for path, layer in self.layers.items():
            replace_module(model, path, layer)
        self.is_injected = True

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`transformer_blocks.0.attn.to_q.lora_A` and so on, always in the same order."""
        for path, layer in self.layers.items():
            for name, parameter in layer.named_parameters(recurse=False):
                yield f"{path}.{name}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones, in the order of `named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    def set_strength(self, strength: float) -> None:
        """Multiplies what every LoRA adds; at 0 the forward is bit-identical to the base's."""
        for layer in self.layers.values():
            layer.strength = float(strength)

    def eject(self) -> None:
        """Puts the original base modules back, with requires_grad as it was."""
        if not self.is_injected:
            return
        for path, layer in self.layers.items():
            replace_module(self.model, path, layer.base)
            if layer.shared is not None:
                layer.shared.release()
        for parameter in self._required_grad:
            parameter.requires_grad_(True)
        self.is_injected = False

    def build_adapter(
        self,
        name: str = "adapter",
        metadata: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> Adapter:
        """The LoRAs as an adapter on the CPU that shares no memory with the layers.

        A PiSSA is exported as a plain LoRA of the original base, at twice the rank and alpha.

        Args:
            dtype: of the copies; None keeps that of the parameters.
            tensors: numbers to take in place of the layers' own, under the names of
                `named_parameters`: an EMA's, or those gathered from several GPUs.
        """
        modules = {
            path: build_weights(layer, path, dtype, tensors) for path, layer in self.layers.items()
        }
        return Adapter(modules, dict(metadata or {}), name=name)

    def load(self, adapter: Adapter) -> tuple[str, ...]:
        """Continues from an adapter: its numbers and its scales replace those of the layers.

        Returns:
            The targets that the adapter lacks; they keep their start, which adds nothing.

        Raises:
            TargetError: it has modules that are not trained here (the inert ones aside).
            ConfigError: another kind or rank than the settings ask for, or PiSSA, whose start
                would be lost.
            ShapeError: made for modules of other sizes.
            NonFiniteWeightsError: NaN or Inf in it.
        """
        self.check_loadable(adapter)
        for path, weights in adapter.modules.items():
            if path in self.layers:
                load_weights(self.layers[path], weights)
        return tuple(path for path in self.layers if path not in adapter.modules)

    def check_loadable(self, adapter: Adapter) -> None:
        """Raises what `load` would, before anything is replaced."""
        if self.plan.settings.is_pissa:
            raise ConfigError(
                "{adapter} cannot be continued with PiSSA, which starts from the base's own "
                'weights; choose another initialisation, e.g. "kaiming" (it will not be used).',
                adapter=adapter.name,
            )
        unknown = [
            path
            for path in adapter.modules
            if path not in self.layers and path not in self.plan.skipped
        ]
        if unknown:
            raise TargetError(
                "{adapter} has {num_modules} that would not be trained and whose effect would "
                "be lost ({unknown}); the targets are {targets}. Choose targets that include "
                "them.",
                adapter=adapter.name,
                num_modules=format_count(len(unknown), "module"),
                unknown=shorten_list(unknown, 3),
                targets=list_patterns(self.plan.settings.targets),
            )
        for path, weights in adapter.modules.items():
            if path in self.layers:
                check_weights(self.layers[path], path, weights, adapter.name)
        adapter.check_finite()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every number of the layers, exact, for a checkpoint; the tensors are not copies."""
        state = {}
        for path, layer in self.layers.items():
            for part in PARTS:
                tensor = getattr(layer, part, None)
                if tensor is not None:
                    state[f"{path}.{part}"] = tensor.detach()
            state[f"{path}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float64)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state_dict`, in place: an optimizer keeps its hold on the parameters.

        Raises:
            ConfigError: made under other settings: a name is missing, unknown, or of another type.
            ShapeError: a tensor has another shape.
        """
        own = self.state_dict()
        different = sorted(own.keys() ^ state_dict.keys())
        if different:
            raise ConfigError(
                "the checkpoint and the settings differ in {num_different} tensors "
                "({different}); resume with the settings it was made with.",
                num_different=len(different),
                different=shorten_list(different, 3),
            )
        for name, tensor in own.items():
            found = state_dict[name]
            if found.shape != tensor.shape:
                raise ShapeError(
                    "the checkpoint holds {name} as {found_shape}, the settings give "
                    "{tensor_shape}; resume with the rank it was made with.",
                    name=name,
                    found_shape=tuple(found.shape),
                    tensor_shape=tuple(tensor.shape),
                )
            if found.dtype != tensor.dtype:
                raise ConfigError(
                    "the checkpoint holds {name} as {found_dtype}, the settings give "
                    "{tensor_dtype}; resume with the precision it was made with.",
                    name=name,
                    found_dtype=found.dtype,
                    tensor_dtype=tensor.dtype,
                )
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        for path, layer in self.layers.items():
            layer.alpha = state_dict[f"{path}.alpha"].item()


def inject(
    model: nn.Module,
    plan: InjectionPlan | LoraSettings,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    device: torch.device | None = None,
    share_inputs: bool = True,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Injection:
    """Adds a trainable LoRA to every target, and freezes the rest.

    The model is changed only once every layer is made. Optimizers, DDP and torch.compile come
    after this, hooks and quantisation of the base before.

    Args:
        plan: of this model, or the settings to plan with.
        dtype: of the trainable parameters; float32 keeps steps that bfloat16 would round away.
        seed: of the random starts; each module's depends on the seed and its path alone.
        device: of the LoRAs; None: each target's own.
        share_inputs: one down-product for q, k and v; never with dropout, which draws for each.

    Raises:
        TargetError, ConfigError: as `plan_injection`; or the model already has LoRAs in it.
        InterruptedError: `should_stop` returned True (PiSSA takes a while).
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ConfigError("the model already carries a LoRA; eject() that one first.")
    if isinstance(plan, LoraSettings):
        plan = plan_injection(model, plan)
    layers = {}
    for target in track(plan.targets, progress, should_stop, message("injection")):
        layers[target.module_path] = build_layer(
            model.get_submodule(target.module_path), target, plan.settings, dtype, seed, device
        )
    if share_inputs and not plan.settings.dropout:
        join_shared_inputs(layers)
    return Injection(model, plan, layers)


def build_layer(
    base: nn.Module,
    target: Target,
    settings: LoraSettings,
    dtype: torch.dtype,
    seed: int,
    device: torch.device | None = None,
) -> LoraLinear:
    device = device or find_device(base)
    alpha = settings.compute_alpha(target.rank)
    lora_B = torch.zeros(target.out_features, target.rank, dtype=dtype, device=device)
    principal = None
    if settings.is_pissa:
        lora_A = torch.zeros(target.rank, target.in_features)
        down, up = compute_principal_factors(
            get_base_weight(base), target.rank, alpha / target.rank
        )
        principal = down.to(device, dtype), up.to(device, dtype)
    else:
        generator = make_generator(target.module_path, seed)
        lora_A = draw_down(settings.init, target.rank, target.in_features, generator)
    kind = DoraLinear if settings.use_dora else LoraLinear
    return kind(base, lora_A.to(device, dtype), lora_B, alpha, settings.dropout, principal)


def find_device(module: nn.Module) -> torch.device:
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def join_shared_inputs(layers: Mapping[str, LoraLinear]) -> None:
    """Links the layers of each block that read the same tensor."""
    groups: dict[tuple[int | None, tuple[str, ...]], list[LoraLinear]] = defaultdict(list)
    for path, layer in layers.items():
        block, name = split_path(path)
        for names in SHARED_INPUTS:
            if name in names:
                groups[block, names].append(layer)
    for group in groups.values():
        if len(group) > 1:
            shared = SharedInput(group)
            for layer in group:
                layer.shared = shared


def replace_module(model: nn.Module, module_path: str, module: nn.Module) -> None:
    parent_path, _, name = module_path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, module)


def build_weights(
    layer: LoraLinear,
    path: str,
    dtype: torch.dtype | None,
    tensors: Mapping[str, torch.Tensor] | None,
) -> ModuleWeights:
    """One layer's share of an adapter."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    if tensors is not None:  # as `torch.func.functional_call` does, for the factors alone
        other = copy.copy(layer)
        replaced = {name: tensors[f"{path}.{name}"] for name in names}
        other._parameters = cast(dict[str, nn.Parameter | None], replaced)
        layer = other

    def store(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()

    down, up = store(layer.down), store(layer.up)
    weights = LoraWeights(down, up, layer.alpha * down.shape[0] / layer.rank)
    if isinstance(layer, DoraLinear):
        return DoraWeights(weights, store(layer.magnitude))
    return weights


def check_weights(layer: LoraLinear, path: str, weights: ModuleWeights, name: str) -> None:
    kind = "DoRA" if isinstance(layer, DoraLinear) else "LoRA"
    direction = weights.direction if isinstance(weights, DoraWeights) else weights
    if weights.kind != kind or not isinstance(direction, LoraWeights):
        raise ConfigError(
            "{name} holds {weights_kind} weights for {path}, the settings ask for {kind}; "
            "choose the same kind, or extract a LoRA from it first.",
            name=name,
            weights_kind=weights.kind,
            path=path,
            kind=kind,
        )
    if weights.shape != (layer.out_features, layer.in_features):
        raise ShapeError(
            "{name} is made for {path} of {weights_shape}, but the model's is {shape}; choose "
            "an adapter of this model.",
            name=name,
            path=path,
            weights_shape=weights.shape,
            shape=(layer.out_features, layer.in_features),
        )
    if weights.rank != layer.rank:
        raise ConfigError(
            "{name} has rank {rank} at {path}, the settings ask for {expected_rank}; set rank = "
            "{rank}, or resize the file first.",
            name=name,
            rank=weights.rank,
            path=path,
            expected_rank=layer.rank,
        )
    if "bias_delta" in weights.parts:
        raise ConfigError(
            "{name} also changes the bias of {path}, which is not trained here and would be "
            "lost; choose another file.",
            name=name,
            path=path,
        )
    if isinstance(weights, DoraWeights) and weights.magnitude.numel() != layer.out_features:
        raise ConfigError(
            "{name} has a magnitude per input column at {path}; training supports only one per "
            "output row. Choose another file.",
            name=name,
            path=path,
        )


@torch.no_grad()
def load_weights(layer: LoraLinear, weights: ModuleWeights) -> None:
    direction = weights.direction if isinstance(weights, DoraWeights) else weights
    assert isinstance(direction, LoraWeights)  # see `check_weights`
    layer.lora_A.copy_(upcast(direction.lora_A))
    layer.lora_B.copy_(upcast(direction.lora_B))
    if isinstance(layer, DoraLinear):
        assert isinstance(weights, DoraWeights)
        layer.magnitude.copy_(upcast(weights.magnitude).reshape(-1))
    layer.alpha = direction.alpha
