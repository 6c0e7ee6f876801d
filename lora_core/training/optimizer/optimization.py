"""Optimizers by name, and their state as tensors and JSON instead of a pickle.

None is implemented here: AdamW is torch's, the others come from their authors' libraries.
A state goes to disk by `flatten_state` and comes back by `unflatten_state` and `load_state`;
training then resumes bit-exactly.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ConfigError


@dataclass(frozen=True)
class OptimizerKind:
    """Where an optimizer comes from, and what can be set."""

    module: str
    class_name: str
    package: str
    """Name for pip."""
    options: Mapping[str, Any]
    """What a user may set -> what it is otherwise."""
    fixed: Mapping[str, Any] = field(default_factory=dict)


#: How torch's own optimizers compute a step, not what: chosen again for the current device.
IMPLEMENTATION = ("foreach", "fused", "capturable")

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(
        "torch.optim",
        "AdamW",
        "torch",
        {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    ),
    "adamw8bit": OptimizerKind(
        "bitsandbytes.optim",
        "AdamW8bit",
        "bitsandbytes",
        {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    ),
    # Finds its own step size: the learning rate is a factor on it, to be left at 1.
    "prodigy": OptimizerKind(
        "prodigyopt",
        "Prodigy",
        "prodigyopt",
        {
            "betas": (0.9, 0.99),
            "eps": 1e-8,
            "weight_decay": 0.01,
            "d_coef": 1.0,
            "use_bias_correction": True,
            "safeguard_warmup": True,
        },
        {"decouple": True},
    ),
    # Its own average of the weights takes the place of a decaying learning rate.
    "schedule-free": OptimizerKind(
        "schedulefree",
        "AdamWScheduleFree",
        "schedulefree",
        {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "warmup_steps": 0},
    ),
    # Not torch's: that one multiplies each step by the weights' size, which cannot be disabled, so
    # that lora_B, which is 0 at first, would move a thousand times too slowly.
    "adafactor": OptimizerKind(
        "transformers.optimization",
        "Adafactor",
        "transformers",
        {"clip_threshold": 1.0, "decay_rate": -0.8, "weight_decay": 0.0},
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
}


def build_optimizer(
    name: str, params: Iterable[torch.nn.Parameter], lr: float, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer over all of `params` in one group, in train mode.

    Args:
        name: one of OPTIMIZERS.
        lr: the learning rate; for "prodigy" a factor on the rate it finds, usually 1.
        options: those of the kind; OPTIMIZERS lists them with their defaults.

    Raises:
        ConfigError: unknown name or option, a value the optimizer refuses, a library that is not
            installed, or no parameters.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(
            "unknown optimizer {name!r}; expected one of {optimizers}",
            name=name,
            optimizers=", ".join(OPTIMIZERS),
        )
    kind = OPTIMIZERS[name]
    unknown = sorted(options.keys() - kind.options.keys())
    if unknown:
        raise ConfigError(
            "{name} has no option {unknown}; expected {options}",
            name=name,
            unknown=", ".join(unknown),
            options=", ".join(kind.options),
        )
    if not (isinstance(lr, int | float) and math.isfinite(lr) and lr > 0):
        raise ConfigError(
            "the learning rate is {lr!r}; expected a number above 0, e.g. 1e-4", lr=lr
        )
    params = list(params)
    if not params:
        raise ConfigError("there are no parameters to train; inject a LoRA first")
    options = {**kind.options, **options, **kind.fixed}
    if name == "adamw" and can_fuse(params):
        options["fused"] = True
    if "betas" in options:  # JSON and TOML have lists only
        options["betas"] = tuple(options["betas"])
    make = import_optimizer(name, kind)
    try:
        # prodigyopt prints that it decouples
        with contextlib.redirect_stdout(None):
            optimizer = make(params, lr=lr, **options)
    except (TypeError, ValueError) as e:
        raise ConfigError("{name} refuses its options: {error}.", name=name, error=e) from None
    set_train_mode(optimizer)
    return optimizer


def can_fuse(params: Iterable[torch.nn.Parameter]) -> bool:
    """Whether a step can be one pass over the weights, as on CUDA and ROCm.

    Its counters are then on the device, and the temporary copies of all weights that the other way
    makes are avoided. A CPU keeps the other, with whose bits older checkpoints resume.
    """
    return all(p.is_cuda and p.is_floating_point() for p in params)


def import_optimizer(name: str, kind: OptimizerKind) -> Callable[..., torch.optim.Optimizer]:
    try:
        return getattr(importlib.import_module(kind.module), kind.class_name)
    except ImportError as e:
        raise ConfigError(
            "the optimizer {name} needs {package}, which cannot be imported here ({error}). "
            "Install it with `pip install {package}`, or choose adamw.",
            name=name,
            package=kind.package,
            error=e,
        ) from None


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """In every group; a schedule's factor times the base rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_train_mode(optimizer: torch.optim.Optimizer) -> None:
    """Schedule-free optimizers step in this mode only; the others have none."""
    train = getattr(optimizer, "train", None)
    if callable(train):
        train()


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The weights a schedule-free optimizer means to be used, for saving and sampling.

    The library's own inverse loses the last bits, so that a run would depend on how often it was
    sampled; here the trained weights are saved and restored. Other optimizers: nothing.
    """
    evaluate = getattr(optimizer, "eval", None)
    if not callable(evaluate):
        yield
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in params]
    evaluate()
    try:
        yield
    finally:
        set_train_mode(optimizer)
        with torch.no_grad():
            for parameter, tensor in zip(params, kept, strict=True):
                parameter.copy_(tensor)


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restores what `optimizer.state_dict()` gave, every tensor in its original type.

    torch casts them to the parameter's type instead, which loses Adafactor's float32 moments of
    bfloat16 weights; and it restores how a step was computed, which this device may not
    support.

    Raises:
        ConfigError: the state was made for other parameters or another optimizer.
    """
    saved_ids = [i for group in state["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved_options = [set(group) for group in state["param_groups"]]
    missing = {key for group in optimizer.param_groups for key in group} - set.union(*saved_options)
    if len(saved_ids) != len(params) or missing:
        raise ConfigError(
            "the checkpoint holds an optimizer's state for {num_saved_ids} parameters with "
            "{saved_options}, which does not fit this {name} over {num_params}; resume with the "
            "settings it was made with.",
            num_saved_ids=len(saved_ids),
            saved_options=", ".join(sorted(set.union(*saved_options) - {"params"})),
            name=type(optimizer).__name__,
            num_params=len(params),
        )
    groups = [
        {**saved, **{name: group[name] for name in IMPLEMENTATION if name in group}}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for index, parameter in zip(saved_ids, params, strict=True):
        for name, tensor in state["state"].get(index, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(loaded, torch.Tensor) and loaded.dtype != tensor.dtype:
                optimizer.state[parameter][name] = tensor.to(loaded.device, copy=True)


def flatten_state(state: Any, prefix: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """A nested state (an optimizer's `state_dict()`) as tensors by name and a JSON value.

    Tensors that occur twice, as the code books of 8-bit states do, are stored once. Numbers survive
    JSON exactly; dictionaries keep the type of their keys, tuples stay tuples.

    Raises:
        ConfigError: the state holds something that is neither a tensor nor plain data.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def flatten(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            name = names.setdefault(id(value), path)
            tensors[name] = value.detach()
            return {"tensor": name}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return {"dict": [[k, flatten(item, f"{path}/{k}")] for k, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [flatten(item, f"{path}/{i}") for i, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        raise ConfigError(
            "the optimizer's state holds a {name} at {path}, which cannot be stored as data; "
            "choose another optimizer.",
            name=type(value).__name__,
            path=path,
        )

    return tensors, flatten(state, prefix or "state")


def unflatten_state(tensors: Mapping[str, torch.Tensor], value: Any) -> Any:
    """The inverse of `flatten_state`.

    Raises:
        ConfigError: a tensor is missing.
    """
    if isinstance(value, list):
        return [unflatten_state(tensors, item) for item in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        if content not in tensors:
            raise ConfigError(
                "the checkpoint lacks {content} of the optimizer's state; use another one.",
                content=content,
            )
        return tensors[content]
    if kind == "tuple":
        return tuple(unflatten_state(tensors, item) for item in content)
    return {key: unflatten_state(tensors, item) for key, item in content}
