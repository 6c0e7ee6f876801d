"""The table of Qwen-Image-2.1: one stream, one modulation for all blocks, no biases.

Names and shapes are those of diffusers' QwenImage21Transformer2DModel. ComfyUI's own files join the
first two Linears of the MLP to `img_mlp.gate_up`, rows of the gate first.
"""

from __future__ import annotations

from ..messages import message
from .family import Family, Fusion

WIDTH = 4096
MLP_WIDTH = 3 * WIDTH

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
MLP = ("img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out")
GATE_UP = "img_mlp.gate_up"

QWEN_IMAGE_21 = Family(
    name="qwen-image-2.1",
    title="Qwen-Image-2.1",
    licence="Qwen Research License",
    is_commercial=False,
    num_blocks=32,
    width=WIDTH,
    block_linears={
        **dict.fromkeys(ATTENTION, (WIDTH, WIDTH)),
        "img_mlp.gate_layer": (MLP_WIDTH, WIDTH),
        "img_mlp.proj": (MLP_WIDTH, WIDTH),
        "img_mlp.out": (WIDTH, MLP_WIDTH),
    },
    top_linears={
        "img_in": (WIDTH, 64),
        "txt_in.in_layer": (WIDTH, WIDTH),
        "txt_in.out_layer": (WIDTH, WIDTH),
        "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
        "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
        "modulation.1": (4 * WIDTH, WIDTH),
        "norm_out.linear": (WIDTH, WIDTH),
        "proj_out": (64, WIDTH),
    },
    block_norms=("attn.norm_q", "attn.norm_k"),
    top_norms=("txt_in.text_norm",),
    # Text and images are one sequence: every block's module serves both.
    default_stream="both",
    streams={
        **dict.fromkeys(("txt_in.in_layer", "txt_in.out_layer", "txt_in.text_norm"), "text"),
        **dict.fromkeys(("img_in", "norm_out.linear", "proj_out"), "image"),
    },
    presets={"full": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP},
    fused={
        "attn.to_qkv": Fusion(
            ("attn.to_q", "attn.to_k", "attn.to_v"), message("query, key and value")
        ),
        GATE_UP: Fusion(("img_mlp.gate_layer", "img_mlp.proj"), message("gate_layer and proj")),
    },
    mlp_fusion=GATE_UP,
    labels={
        "attn.to_out.0": "to_out",
        "img_mlp.gate_layer": "mlp gate",
        "img_mlp.proj": "mlp up",
        "img_mlp.out": "mlp down",
    },
    architecture="Qwen-Image-2.1/lora",
    base_version="qwen_image_21",
    network_module="networks.lora_qwen_image_21",
)
