"""Weights that make the shrunken base edit the photograph, where random ones would paint noise.

Written down, not trained. The VAE averages 8 x 8 pixels into the latent and smooths them back. The
DiT's first block lets each target token look up the reference token at its own place and moves the
target there. The LoRA exchanges red and blue on that way, so a strength of 0 gives the photograph,
1 a blue cup and 0.5 a purple one. Everything else is small random weights, so that every module
still has an effect.
"""

from __future__ import annotations

import math

import torch

from .dit import HEAD_WIDTH, IN_CHANNELS, NUM_HEADS, make_tensor

WIDTH = NUM_HEADS * HEAD_WIDTH
LATENT_CHANNELS = 16
COLOURS = 3
PATCH = 4  # 2 x 2 latent pixels a token
INFO = COLOURS * PATCH  # what the decoder can see of a token

# Latent normalisation of the Wan VAE: ComfyUI's latent_formats.Wan21, diffusers' vae/config.json.
LATENT_MEAN = torch.tensor(
    (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
)
LATENT_STD = torch.tensor(
    (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
)
AMPLITUDE = 4.0  # of a colour in [-1, 1] in normalised latents: gives them a std of about 1

ANCHOR = 16.0  # a constant channel, so that the norms divide by nearly the same everywhere
HIDDEN_ANCHOR = 8.0  # the same in the DiT, on the channels that carry nothing else
LOOKUP_GAIN = 5.8  # of norm_q and norm_k: the neighbouring token then gets e^-6 of the attention
PULL = 2.0  # velocity = PULL * (target - reference)
NOISE = 0.05  # scale of the random rest
STYLE_DELTA_STD = 2e-3  # of the demo LoRA away from the colour exchange


def make_colour_basis() -> torch.Tensor:
    """Orthonormal directions of red, green and blue in latent space, (16, 3)."""
    return torch.linalg.qr(make_tensor("colours", (LATENT_CHANNELS, COLOURS), 0))[0]


def craft_vae(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a WanVAE with other values: it keeps a picture at an eighth of its size.

    Channels: 0-2 are the colours, 3-5 their negatives (silu(x) - silu(-x) = x), 6 the anchor.
    """
    basis = make_colour_basis()
    crafted = {key: torch.zeros_like(tensor) for key, tensor in state_dict.items()}
    for key, tensor in crafted.items():  # the residual branches and attention stay 0
        if key.endswith("gamma"):
            tensor.fill_(1)
        elif key.endswith("shortcut.weight"):
            tensor[:, :, 0, 0, 0] = torch.eye(*tensor.shape[:2])
        elif key.endswith("resample.1.weight"):
            kernel = torch.zeros(3, 3)
            if key.startswith("encoder"):
                kernel[:2, :2] = 1 / 4
            else:
                kernel = torch.outer(*[torch.tensor([1.0, 2.0, 1.0]) / 4] * 2)
            tensor[:6, :6] = torch.eye(6)[:, :, None, None] * kernel
        elif key.endswith("resample.1.bias"):
            tensor[6] = ANCHOR
    signs = torch.cat([torch.eye(COLOURS), -torch.eye(COLOURS)])  # (6, 3)
    for part in ("encoder", "decoder"):
        # [-1, 1, 1]: the present frame and the pixel itself
        crafted[f"{part}.conv1.weight"][:6, :COLOURS, -1, 1, 1] = signs
        head = crafted[f"{part}.head.2.weight"]
        head[:COLOURS, :6, -1, 1, 1] = signs.T * ANCHOR / math.sqrt(head.shape[1])
    # one 1 x 1 convolution each way between colours and the latent as ComfyUI expects it
    to_latent = AMPLITUDE * LATENT_STD[:, None] * basis
    crafted["conv1.weight"][:LATENT_CHANNELS, :COLOURS, 0, 0, 0] = to_latent
    crafted["conv1.bias"][:LATENT_CHANNELS] = LATENT_MEAN
    from_latent = basis.T / LATENT_STD / AMPLITUDE
    crafted["conv2.weight"][:COLOURS, :, 0, 0, 0] = from_latent
    crafted["conv2.bias"][:COLOURS] = -from_latent @ LATENT_MEAN
    return crafted


def craft_dit(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a tiny DiT with other values: it moves the target to the reference.

    Channels of the hidden state: 0-11 the token's own colours, 12-23 the reference's, the rest a
    constant pattern of mean 0.
    """
    crafted = dict(state_dict)
    for key in crafted:
        writes_to_stream = key.endswith(("to_out.0.weight", "to_add_out.weight", "net.2.weight"))
        if key.endswith("_mod.1.weight") or writes_to_stream or key.startswith("norm_out."):
            crafted[key] = crafted[key] * NOISE
        if key.endswith("_mod.1.bias"):
            gates = crafted[key].clone() * NOISE
            gates.view(6, WIDTH)[[2, 5]] += (
                1  # shift, scale, gate; once for attention, once for MLP
            )
            crafted[key] = gates

    to_colours = torch.kron(make_colour_basis().T, torch.eye(PATCH))  # (12, 64), token order c, p
    img_in = torch.zeros(WIDTH, IN_CHANNELS)
    img_in[:INFO] = to_colours
    anchor = torch.zeros(WIDTH)
    anchor[2 * INFO :: 2], anchor[2 * INFO + 1 :: 2] = HIDDEN_ANCHOR, -HIDDEN_ANCHOR
    crafted["img_in.weight"], crafted["img_in.bias"] = img_in, anchor
    deviation = anchor.std(unbiased=False).item()  # what every LayerNorm divides by, nearly

    attention = "transformer_blocks.0.attn"
    query, key = make_lookup()
    for name, lookup in (("q", query), ("k", key)):
        weight = crafted[f"{attention}.to_{name}.weight"].clone()
        weight[:HEAD_WIDTH] *= NOISE  # the first head looks up by place alone
        crafted[f"{attention}.to_{name}.weight"] = weight
        crafted[f"{attention}.to_{name}.bias"] = torch.cat([lookup, torch.zeros(HEAD_WIDTH)])
        crafted[f"{attention}.norm_{name}.weight"] = torch.full((HEAD_WIDTH,), LOOKUP_GAIN)
    value = crafted[f"{attention}.to_v.weight"].clone()
    value[:HEAD_WIDTH] = 0
    value[:INFO, :INFO] = torch.eye(INFO)
    crafted[f"{attention}.to_v.weight"] = value
    out = crafted[f"{attention}.to_out.0.weight"].clone()
    out[:, :HEAD_WIDTH] = 0
    out[INFO : 2 * INFO, :INFO] = deviation * torch.eye(INFO)
    crafted[f"{attention}.to_out.0.weight"] = out

    difference = torch.zeros(INFO, WIDTH)
    difference[:, :INFO], difference[:, INFO : 2 * INFO] = torch.eye(INFO), -torch.eye(INFO)
    crafted["proj_out.weight"] = PULL * deviation * to_colours.T @ difference
    return crafted


def make_lookup() -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key that RoPE makes equal when the key is at the same place one frame later.

    RoPE turns the pair of channels i of an axis by position * 10000 ** (-i / pairs); frame 0 is the
    target, 1 the first reference. Axes 4 / 14 / 14 of a head of 32, as the shim splits it.
    """
    key = torch.zeros(HEAD_WIDTH // 2, 2)
    key[:, 0] = 1
    query = key.clone()
    query[0] = torch.tensor([math.cos(1), math.sin(1)])
    return query.flatten(), key.flatten()


def craft_adapter(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds the exchange of red and blue to a LoRA of the crafted DiT, rank 4 or more.

    Written on the first block's output projection: delta = (red - blue) (blue - red)^T per pixel.
    """
    crafted = dict(state_dict)
    target = "diffusion_model.transformer_blocks.0.attn.to_out.0"
    lora_A = crafted[f"{target}.lora_A.weight"].clone()
    lora_B = crafted[f"{target}.lora_B.weight"].clone()
    exchange = torch.kron(torch.tensor([[-1.0, 0.0, 1.0]]), torch.eye(PATCH))  # (4, 12)
    lora_A[:PATCH], lora_B[:, :PATCH] = 0, 0
    lora_A[:PATCH, :INFO] = exchange
    deviation = HIDDEN_ANCHOR * math.sqrt(1 - 2 * INFO / WIDTH)
    lora_B[INFO : 2 * INFO, :PATCH] = -deviation * exchange.T
    crafted[f"{target}.lora_A.weight"] = lora_A
    crafted[f"{target}.lora_B.weight"] = lora_B
    return crafted
