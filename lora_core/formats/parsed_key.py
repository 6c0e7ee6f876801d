"""One state-dict key, parsed once: `lora_unet_..._attn_to_q.lora_down.weight` is part lora_A of
`transformer_blocks.0.attn.to_q`.

What is known of the schemes in the wild, with each producer: the keys of diffusers, PEFT, kohya
(musubi-tuner), LyCORIS, ai-toolkit, DiffSynth, OneTrainer, lightx2v and ComfyUI's own trainer.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import lru_cache

from ..base_model import families
from ..messages import message
from .architectures import MAX_KEY


@dataclass(frozen=True, slots=True)
class ParsedKey:
    key: str
    module_path: str
    """A module of the transformer, or one of `families.FUSED`."""
    part: str
    """lora_A, lora_B, alpha, magnitude, hada_w1_a, lokr_w1, oft_blocks, diff, diff_b, ..."""
    prefix: str
    """As found, e.g. "lora_unet_", with wrappers that stood further behind; empty for bare keys."""
    adapter_name: str | None = None
    """PEFT's name of the adapter where the key carries one."""
    spelling: str = ""
    """Of lora_A and lora_B the key of the lora_A in the same spelling; "" of other parts."""


@dataclass(frozen=True, slots=True)
class UnknownKey:
    """A key that could not be placed. `rest` is what is left of it without known decoration."""

    key: str
    reason: str
    rest: str
    spoils: tuple[str, str] | None = None
    """(prefix, module path) of the module whose other keys get another meaning by this one."""

    @property
    def nearest(self) -> str | None:
        return find_nearest(self.rest)


#: Prefix -> name of its scheme. Wrappers stack in any order, so they are peeled one by one.
DOTTED_PREFIXES = {
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "base_model.model.": "peft",
    "pipe.dit.": "diffsynth",
    "dit.": "diffsynth",
    "unet.": "unet",
    "model.": "wrapped",
}
#: Segments that PyTorch's wrappers add at any place of a name: torch.compile, DDP, FSDP,
#: activation checkpointing, Lightning.
WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
    "module",
)
#: A wrapper between dots, or between underscores where those replace dots.
_WRAPPER = re.compile(rf"(?:^|[._])(?P<wrapper>{'|'.join(WRAPPERS)})(?:[._]|\Z)")
UNDERSCORED_PREFIXES = {
    "lora_unet_": "kohya",
    "lora_transformer_": "onetrainer",
    "lycoris_": "lycoris",
    "lora_": "kohya",
}
#: What may follow these where dots became underscores.
_UNDERSCORED_WRAPPERS = ("diffusion_model_", "base_model_model_", "model_", "dit_", "transformer_")
BARE = "bare"

_AB = {"A": "lora_A", "B": "lora_B", "down": "lora_A", "up": "lora_B"}
_SUFFIXES: tuple[tuple[re.Pattern[str], str | None], ...] = tuple(
    (re.compile(pattern + r"\Z"), part)
    for pattern, part in (
        # The part is the named group's translation where it is None here.
        (r"\.lora_(?P<ab>A|B)\.weight", None),
        (r"\.lora_(?P<ab>A|B)\.(?P<name>[^.]+)\.weight", None),
        (r"\.lora_(?P<ab>A|B)", None),
        (r"\.lora_B\.bias", "lora_B_bias"),
        (r"\.lora_B\.(?P<name>[^.]+)\.bias", "lora_B_bias"),
        (r"\.lora_(?P<ab>down|up)\.weight", None),
        # PAI's PDD files. nunchaku packs other numbers under these, see `find_packed`.
        (r"\.lora_(?P<ab>down|up)", None),
        (r"\.lora\.(?P<ab>down|up)\.weight", None),
        (r"_lora\.(?P<ab>down|up)\.weight", None),
        (r"\.lora_linear_layer\.(?P<ab>down|up)\.weight", None),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "magnitude"),
        (r"\.magnitude", "magnitude"),
        (r"\.lora_magnitude_vector(?:\.weight)?", "magnitude"),
        (r"\.lora_magnitude_vector\.(?P<name>[^.]+?)(?:\.weight)?", "magnitude"),
        (r"\.(?P<same>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|oft_blocks)", None),
        (r"\.rescale", "oft_rescale"),
        (r"\.(?P<same>diff|diff_b)", None),
        (r"\.w_norm", "diff"),
        (r"\.b_norm", "diff_b"),
    )
)

PACKED = message(
    "nunchaku's own format, packed for its kernels; use the file it was converted from"
)
OF_TEXT_ENCODER = message("belongs to a text encoder, which an edit LoRA does not change")
UNKNOWN_ENDING = message("its ending belongs to no known adapter type")
TOO_LONG = message(
    "it has more than {max_key} characters, which no adapter's key has", max_key=MAX_KEY
)
#: Suffixes that are recognised and not supported, with a message for the user, and whether the
#: module's other keys mean something else without this one.
_UNSUPPORTED = tuple(
    (re.compile(f"(?:{pattern})\\Z"), reason, spoils)
    for pattern, reason, spoils in (
        (
            r"\.lora_mid\.weight|\.hada_t[12]|\.lokr_t2",
            message("a Tucker core, which only convolutions use"),
            True,
        ),
        (
            r"\.lora_E(?:\.[^.]+)?",
            message("AdaLoRA's singular values, which are not supported"),
            True,
        ),
        (
            r"\.lora_diag(?:\.[^.]+)?",
            message("KaSA's singular values, which are not supported"),
            True,
        ),
        (
            r"\.[ab][12]\.weight",
            message("GLoRA, which is not supported; use ComfyUI's LoraLoader"),
            False,
        ),
        (
            r"\.set_weight|\.reshape_weight",
            message("a replaced weight, which is not a LoRA; not supported"),
            True,
        ),
        (
            r"\.on_input|\.ia3_l(?:\.[^.]+)?",
            message("IA3, which is not a LoRA; not supported"),
            False,
        ),
        (r"\.(?:proj_down|proj_up|smooth|smooth_orig)", PACKED, False),
        (
            r"\.(?:oft|boft|vera|hra)_\w.*",
            message("a PEFT adapter type that is not supported"),
            False,
        ),
        (
            r"\.lora_(?:embedding_[AB]|ga)\b.*",
            message("an embedding adapter; Qwen-Image has none"),
            False,
        ),
    )
)


def parse_key(key: str) -> ParsedKey | UnknownKey:
    """Parses one key, or says why it is unknown. Never raises."""
    if len(key) > MAX_KEY:
        return UnknownKey(key, TOO_LONG, "")
    for pattern, part in _SUFFIXES:
        match = pattern.search(key)
        if match is None:
            continue
        groups = match.groupdict()
        part = part or groups.get("same") or _AB[groups["ab"]]
        stem = key[: match.start()]
        prefix, module_path = split_prefix(stem)
        if is_known(module_path):
            spelling = ""
            if "ab" in groups:
                down = "A" if groups["ab"] in ("A", "B") else "down"
                spelling = key[: match.start("ab")] + down + key[match.end("ab") :]
            return ParsedKey(key, module_path, part, prefix, groups.get("name"), spelling)
        return UnknownKey(key, explain_stem(stem), module_path)
    for pattern, reason, spoils in _UNSUPPORTED:
        match = pattern.search(key)
        if match is not None:
            prefix, rest = split_prefix(key[: match.start()])
            spoiled = (prefix, rest) if spoils and is_known(rest) else None
            return UnknownKey(key, reason, rest, spoiled)
    return UnknownKey(key, UNKNOWN_ENDING, split_prefix(key)[1])


def is_known(module_path: str) -> bool:
    return families.is_known(module_path) or families.is_fused(module_path)


@lru_cache(maxsize=4096)  # a module's keys share their stem
def split_prefix(stem: str) -> tuple[str, str]:
    """`transformer.base_model.model.img_in` -> ("transformer.base_model.model.", "img_in").

    Wrappers are dropped wherever they occur, and count as part of the prefix. Underscored stems
    are returned dotted where they name a known module.
    """
    rest, wrappers = drop_wrappers(stem)
    prefix = ""
    while found := next((p for p in DOTTED_PREFIXES if rest.startswith(p)), None):
        prefix, rest = prefix + found, rest[len(found) :]
    if not is_known(rest):
        peeled, flat = "", rest
        names = (*UNDERSCORED_PREFIXES, *_UNDERSCORED_WRAPPERS)
        while True:
            dotted = restore_dots(flat)
            if dotted is not None:
                return prefix + peeled + wrappers, dotted
            # Such a prefix may also end in a dot: lycoris.transformer_blocks.0.attn.to_q
            found = next((p for p in names if flat[: len(p)].replace(".", "_") == p), None)
            if found is None:
                break
            peeled, flat = peeled + flat[: len(found)], flat[len(found) :]
    return prefix + wrappers, rest


def drop_wrappers(stem: str) -> tuple[str, str]:
    """The name without the wrappers' segments, and those with a dot behind each."""
    found = ""
    if any(wrapper in stem for wrapper in WRAPPERS):
        while match := _WRAPPER.search(stem):
            found += f"{match['wrapper']}."
            stem = stem[: match.start("wrapper")] + stem[match.end() :]
    return stem.rstrip(".") if found else stem, found


def restore_dots(flat: str) -> str | None:
    """A known module's path from any mixture of dots and underscores; None if it names none."""
    flat = flat.replace(".", "_").rstrip("_")
    return families.restore_dots(flat)


def name_scheme(prefix: str) -> str:
    """The scheme a prefix denotes; wrappers such as "module." around it do not count."""
    if "base_model.model." in prefix:
        return "peft"
    flat = prefix.replace(".", "_")
    for known, scheme in UNDERSCORED_PREFIXES.items():
        if flat.startswith(known):
            return scheme
    for known, scheme in DOTTED_PREFIXES.items():
        if known in prefix and scheme != "wrapped":
            return scheme
    return BARE


def explain_stem(stem: str) -> str:
    if re.search(r"(^|[._])(lora_te\d?|text_encoders?|text_model|clip_[lg])[._]", stem):
        return OF_TEXT_ENCODER
    return message("names no module of a Qwen-Image transformer")


@lru_cache(maxsize=256)
def find_nearest(rest: str) -> str | None:
    """The known module path that is spelled most like `rest`, or None if nothing is near."""
    block = re.search(r"transformer_blocks[._]0*([0-9]+)[._](.+)", rest)
    known = dict.fromkeys(
        known
        for family in families.FAMILIES
        for known in ((*family.block_linears, *family.block_norms) if block else family.top_linears)
    )
    name = (block[2] if block else rest).replace("_", ".")
    spelled = {candidate.replace("_", "."): candidate for candidate in known}
    close = [c for c in spelled if name.startswith(c) or c.startswith(f"{name}.")]
    close = close or difflib.get_close_matches(name, spelled, n=1, cutoff=0.6)
    if not close:
        return None
    nearest = spelled[close[0]]
    return f"transformer_blocks.{block[1]}.{nearest}" if block else nearest
