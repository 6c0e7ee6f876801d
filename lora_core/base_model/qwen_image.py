"""The table of Qwen-Image: text-to-image, Edit, 2509 and 2511.

Names and shapes are those of diffusers' QwenImageTransformer2DModel, which ComfyUI shares
(comfy/ldm/qwen_image/model.py).
"""

from __future__ import annotations

from ..messages import message
from .family import Family, Fusion

WIDTH = 3072
TEXT_WIDTH = 3584

ATTENTION_IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
ATTENTION_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
MLP_IMAGE = ("img_mlp.net.0.proj", "img_mlp.net.2")
MLP_TEXT = ("txt_mlp.net.0.proj", "txt_mlp.net.2")
MODULATION_IMAGE = ("img_mod.1",)
MODULATION_TEXT = ("txt_mod.1",)

BLOCK_LINEARS = (
    ATTENTION_IMAGE + ATTENTION_TEXT + MLP_IMAGE + MLP_TEXT + MODULATION_IMAGE + MODULATION_TEXT
)
#: (out, in) as multiples of the width; every other Linear of a block is (1, 1).
_MULTIPLES = {
    **dict.fromkeys(("img_mlp.net.0.proj", "txt_mlp.net.0.proj"), (4, 1)),
    **dict.fromkeys(("img_mlp.net.2", "txt_mlp.net.2"), (1, 4)),
    **dict.fromkeys(MODULATION_IMAGE + MODULATION_TEXT, (6, 1)),
}
_ADDED_QKV = Fusion(
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), message("query, key and value")
)

QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    licence="Apache-2.0",
    is_commercial=True,
    num_blocks=60,
    width=WIDTH,
    block_linears={
        name: (out * WIDTH, in_ * WIDTH)
        for name in BLOCK_LINEARS
        for out, in_ in [_MULTIPLES.get(name, (1, 1))]
    },
    top_linears={
        "img_in": (WIDTH, 64),
        "txt_in": (WIDTH, TEXT_WIDTH),
        "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
        "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
        "norm_out.linear": (2 * WIDTH, WIDTH),
        "proj_out": (64, WIDTH),
    },
    block_norms=("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
    top_norms=("txt_norm",),
    default_stream="image",
    streams={
        **dict.fromkeys(
            (
                *(ATTENTION_TEXT + MLP_TEXT + MODULATION_TEXT),
                *("attn.norm_added_q", "attn.norm_added_k", "txt_in", "txt_norm"),
            ),
            "text",
        ),
        **dict.fromkeys(
            (
                "time_text_embed.timestep_embedder.linear_1",
                "time_text_embed.timestep_embedder.linear_2",
            ),
            "both",
        ),
    },
    presets={
        "full": ATTENTION_IMAGE + ATTENTION_TEXT + MLP_IMAGE + MLP_TEXT,
        "attention": ATTENTION_IMAGE + ATTENTION_TEXT,
        "image-stream": ATTENTION_IMAGE + MLP_IMAGE,
        "text-stream": ATTENTION_TEXT + MLP_TEXT,
        "image-attention": ATTENTION_IMAGE,
        "mlp": MLP_IMAGE + MLP_TEXT,
        "attention + image-mlp": ATTENTION_IMAGE + ATTENTION_TEXT + MLP_IMAGE,
        "full + modulation": BLOCK_LINEARS,
        "attention + modulation": (
            ATTENTION_IMAGE + ATTENTION_TEXT + MODULATION_IMAGE + MODULATION_TEXT
        ),
        "image-stream + modulation": ATTENTION_IMAGE + MLP_IMAGE + MODULATION_IMAGE,
        "modulation": MODULATION_IMAGE + MODULATION_TEXT,
        "diffsynth": (
            *(ATTENTION_IMAGE + ATTENTION_TEXT),
            *("img_mlp.net.2", "txt_mlp.net.2"),
            *(MODULATION_IMAGE + MODULATION_TEXT),
        ),
    },
    # As diffusers' fuse_qkv_projections joins them.
    fused={
        "attn.to_qkv": Fusion(
            ("attn.to_q", "attn.to_k", "attn.to_v"), message("query, key and value")
        ),
        "attn.to_added_qkv": _ADDED_QKV,
        "attn.add_qkv_proj": _ADDED_QKV,
    },
    # The last block's text output is discarded by the model, so these never receive a gradient.
    inert_last_block=("attn.to_add_out", "attn.add_q_proj", *MLP_TEXT),
    variants=("original", "2509", "2511", "text-to-image"),
    labels={
        "attn.to_out.0": "to_out",
        "attn.add_q_proj": "add_q",
        "attn.add_k_proj": "add_k",
        "attn.add_v_proj": "add_v",
        "img_mlp.net.0.proj": "img_mlp up",
        "img_mlp.net.2": "img_mlp down",
        "txt_mlp.net.0.proj": "txt_mlp up",
        "txt_mlp.net.2": "txt_mlp down",
        "img_mod.1": "img_mod",
        "txt_mod.1": "txt_mod",
    },
    base_version="qwen_image",
    network_module="networks.lora_qwen_image",
)
