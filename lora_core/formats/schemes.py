"""The schemes this package writes: how a module's tensors are spelled, and where alpha goes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..adapter.adapter import Adapter
from ..adapter.weights import ModuleWeights, OftWeights
from ..base_model.qwen_image import QWEN_IMAGE
from ..errors import ConfigError
from .architectures import ARCHITECTURES
from .layouts import FUSED


@dataclass(frozen=True)
class KeyScheme:
    """One way to spell an adapter's keys."""

    name: str
    spell_module: Callable[[str], str]
    """Module path -> stem of its keys, prefix included."""
    suffixes: Mapping[str, str]
    """Part as this package names it -> ending of the key. A part not listed cannot be written."""
    alpha_in_tensor: bool
    """False: alpha travels as PEFT's LoraConfig (header or adapter_config.json) instead."""
    has_relative_oft: bool = False
    """alpha of an OFT counts in out_features, see `building.RELATIVE_OFT`."""

    def spell(self, module_path: str, weights: ModuleWeights) -> dict[str, torch.Tensor]:
        """The tensors of one module under their keys, unchanged.

        Raises:
            ConfigError: this scheme has no spelling for the module's kind.
        """
        stem = self.spell_module(module_path)
        spelled = {}
        for part in weights.parts:
            if part not in self.suffixes:
                raise ConfigError(
                    "{module_path} holds {weights_kind} weights ({part}), which the {name} "
                    "format cannot express; expected plain LoRA. Write it as comfyui instead.",
                    module_path=module_path,
                    weights_kind=weights.kind,
                    part=part,
                    name=self.name,
                )
            tensor = weights.need_part(part)
            if part == "magnitude":
                tensor = self.shape_magnitude(module_path, tensor)
            spelled[stem + self.suffixes[part]] = tensor
        has_scale = weights.kind != "diff"
        if self.alpha_in_tensor and has_scale:
            alpha = weights.alpha
            if isinstance(weights, OftWeights) and self.has_relative_oft:
                alpha /= weights.out_features
            spelled[f"{stem}.alpha"] = store_exactly(alpha)
        return spelled

    def shape_magnitude(self, module_path: str, magnitude: torch.Tensor) -> torch.Tensor:
        """LyCORIS stores a magnitude per row as (out, 1) and per column as (1, in); PEFT (out,)."""
        is_lycoris = self.alpha_in_tensor
        if magnitude.ndim == 1 or magnitude.shape[1] == 1:
            return magnitude.reshape((-1, 1) if is_lycoris else (-1,))
        if is_lycoris:
            return magnitude
        raise ConfigError(
            "{module_path} holds DoRA magnitudes per input column, which the {name} format "
            "cannot express; write it as comfyui instead.",
            module_path=module_path,
            name=self.name,
        )


#: LyCORIS spells its kinds the same way under every prefix.
_LYCORIS = {
    **{f"hada_{factor}": f".hada_{factor}" for factor in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"lokr_{f}{p}": f".lokr_{f}{p}" for f in ("w1", "w2") for p in ("", "_a", "_b")},
    "blocks": ".oft_blocks",
    "rescale": ".rescale",
    "magnitude": ".dora_scale",
    "diff": ".diff",
    "bias_delta": ".diff_b",
}
_AB = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight"}
_PEFT = {**_AB, "magnitude": ".lora_magnitude_vector.weight"}

SCHEMES: dict[str, KeyScheme] = {
    scheme.name: scheme
    for scheme in (
        KeyScheme("comfyui", lambda path: f"diffusion_model.{path}", {**_AB, **_LYCORIS}, True),
        # diffusers 0.42 puts "transformer." before any file that has .alpha keys, so a file that
        # already carries the prefix must keep alpha out of its tensors.
        KeyScheme("diffusers", lambda path: f"transformer.{path}", _PEFT, False),
        KeyScheme(
            "kohya",
            lambda path: "lora_unet_" + path.replace(".", "_"),
            {"lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight", **_LYCORIS},
            True,
            has_relative_oft=True,
        ),
        KeyScheme("peft", lambda path: f"base_model.model.{path}", _PEFT, False),
    )
}


#: ComfyUI maps the halves of a fused module only for names without a prefix, and the fused one only
#: for names with this prefix (comfy/lora.py, model_lora_keys_unet).
_COMFYUI_BARE = replace(SCHEMES["comfyui"], spell_module=str)
#: Formats of programs that know the split layout only.
SPLIT_ONLY = ("diffusers", "peft")


def choose_scheme(name: str, adapter: Adapter, mlp_layout: str | None) -> KeyScheme:
    """The scheme of this name, for an adapter written in this layout.

    Raises:
        ConfigError: no such scheme, or its program does not know the layout.
    """
    scheme = get_scheme(name)
    if mlp_layout == FUSED:
        if name in SPLIT_ONLY:
            raise ConfigError(
                "the {name} format is for diffusers' model, whose MLP is split; write "
                "mlp_layout fused as comfyui or kohya",
                name=name,
            )
        return scheme
    family = adapter.base_family
    is_mapped = family is not None and family.mlp_fusion is not None
    return _COMFYUI_BARE if name == "comfyui" and is_mapped else scheme


def get_scheme(name: str) -> KeyScheme:
    if name not in SCHEMES:
        raise ConfigError(
            "unknown key_format {name!r}; expected one of {schemes}",
            name=name,
            schemes=", ".join(SCHEMES),
        )
    return SCHEMES[name]


def build_lora_config(adapter: Adapter) -> dict[str, object]:
    """The LoraConfig under which PEFT applies every module at its own scale.

    Raises:
        ConfigError: some modules are DoRA and some are not; PEFT knows one kind per file.
    """
    if len(adapter.kinds) > 1:
        raise ConfigError(
            "{adapter} mixes {kinds} modules, but PEFT's config has one kind for all of them; "
            "write it as comfyui instead.",
            adapter=adapter.name,
            kinds=" and ".join(sorted(adapter.kinds)),
        )
    modules = adapter.modules
    rank = Counter(weights.rank for weights in modules.values()).most_common(1)[0][0]
    alpha = Counter(weights.alpha for weights in modules.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {p: w.rank for p, w in modules.items() if w.rank != rank},
        "alpha_pattern": {p: w.alpha for p, w in modules.items() if w.alpha != alpha},
        "target_modules": sorted(modules),
        "use_rslora": False,
        "use_dora": "DoRA" in adapter.kinds,
        "bias": "none",
    }


#: Of the header: the training configuration that our own trainer writes, as JSON.
CONFIG_KEY = "qwen_edit_lora.config"


def build_metadata(adapter: Adapter, scheme: KeyScheme, title: str) -> dict[str, str]:
    """The old header plus what other programs identify the file by (modelspec 1.0.0, kohya's ss_*).

    Fields that would contradict the new spelling are dropped: diffusers applies
    `lora_adapter_metadata` on top of alpha tensors.
    """
    metadata = {k: v for k, v in adapter.metadata.items() if k != "lora_adapter_metadata"}
    scaled = [weights for weights in adapter.modules.values() if weights.kind != "diff"]
    ranks = Counter(weights.rank for weights in scaled)
    alphas = Counter(weights.alpha for weights in scaled)
    metadata.setdefault("modelspec.sai_model_spec", "1.0.0")
    if len(adapter.report.variants) == 1:
        metadata.setdefault("modelspec.architecture", ARCHITECTURES[adapter.report.variants[0]])
    metadata.setdefault("modelspec.title", title)
    family = adapter.base_family or QWEN_IMAGE
    if family.architecture:
        metadata.setdefault("modelspec.architecture", family.architecture)
    metadata.setdefault("ss_base_model_version", family.base_version)
    metadata.update(
        {
            "format": "pt",
            "ss_network_module": family.network_module,
            "ss_network_dim": single_or_dynamic(ranks),
            "ss_network_alpha": single_or_dynamic(alphas),
        }
    )
    if scheme.name == "diffusers":
        config = {f"transformer.{k}": v for k, v in build_lora_config(adapter).items()}
        metadata["lora_adapter_metadata"] = json.dumps(config, sort_keys=True)
    return metadata


def store_exactly(number: float) -> torch.Tensor:
    """float32 where that holds the number (every trainer's alpha), else float64 (rsLoRA's)."""
    tensor = torch.tensor(number, dtype=torch.float32)
    return tensor if tensor.item() == number else torch.tensor(number, dtype=torch.float64)


def single_or_dynamic(counts: Counter) -> str:
    """kohya's convention: one value, or the word where modules differ."""
    return f"{next(iter(counts)):g}" if len(counts) == 1 else "Dynamic"
