"""Initial weights of the DiT's training: constructed so that they reproduce the first reference.

Channels of the hidden state: 0-63 the token itself, 64-127 the reference's token at the same
position, the rest a constant pattern (the anchor) that keeps the norms' divisor nearly constant. In
both blocks four heads look up the reference by position, and the last one reads the text. Block 0
writes the result into channels 64-127; the output is (token - reference) / sigma, the velocity that
leads to the reference. All else is small random weights. Constructed values that matter are powers
of two, which every storage represents exactly.
"""

from __future__ import annotations

import math

import torch

from .dit import HEAD_WIDTH, IN_CHANNELS, NUM_BLOCKS, ROPE_AXES, TIME_CHANNELS, WIDTH, make_dit

OWN = slice(0, IN_CHANNELS)
REFERENCE = slice(IN_CHANNELS, 2 * IN_CHANNELS)
ANCHOR = slice(2 * IN_CHANNELS, WIDTH)
TEXT_HEAD = slice(WIDTH - HEAD_WIDTH, WIDTH)

DEVIATION = 4.0  # of a token's channels when its 64 numbers have a variance of 1
LOOKUP_GAIN = 7.0  # of norm_q and norm_k: a neighbouring token then gets e^-8 of the attention
NOISE = 0.05  # scale of the random rest
SMALLEST_SIGMA = 0.03  # the gain 1 / sigma grows no further below
HINGES = 48  # channels of the time embedding that carry it
SLOWEST = 1e-3  # turns a unit of the timestep (1000 sigma) by that: one radian for all levels


def craft_dit() -> dict[str, torch.Tensor]:
    """The state dict that `copying.train_copying` starts from, float32, without variant markers."""
    crafted = make_dit("2509", seed=3)
    for key in crafted:
        writes_to_stream = key.endswith(("to_out.0.weight", "to_add_out.weight", "net.2.weight"))
        if key.endswith("_mod.1.weight") or writes_to_stream:
            crafted[key] = crafted[key] * NOISE
        if key.endswith("_mod.1.bias"):  # shift, scale, gate; once for attention, once for MLP
            gates = crafted[key] * NOISE
            gates.view(6, WIDTH)[[2, 5]] += 1
            crafted[key] = gates
    craft_ends(crafted)
    craft_gain(crafted)
    for index in range(NUM_BLOCKS):
        craft_attention(crafted, f"transformer_blocks.{index}.attn")
    attention = "transformer_blocks.0.attn"
    value, out = (crafted[f"{attention}.{name}.weight"] for name in ("to_v", "to_out.0"))
    value[OWN], out[:, OWN] = 0, 0
    value[OWN, OWN] = torch.eye(IN_CHANNELS)
    out[REFERENCE] = 0
    out[REFERENCE, OWN] = DEVIATION * torch.eye(IN_CHANNELS)
    return crafted


def craft_ends(crafted: dict[str, torch.Tensor]) -> None:
    """The layers into and out of the hidden state."""
    entry = torch.zeros(WIDTH, IN_CHANNELS)
    entry[OWN] = torch.eye(IN_CHANNELS)
    number = WIDTH - 2 * IN_CHANNELS
    amplitude = math.sqrt((WIDTH * DEVIATION**2 - IN_CHANNELS) / number)
    anchor = torch.zeros(WIDTH)
    anchor[ANCHOR] = amplitude * torch.tensor([1.0, -1.0]).repeat(number // 2)
    crafted["img_in.weight"], crafted["img_in.bias"] = entry, anchor
    exit_weight = torch.zeros(IN_CHANNELS, WIDTH)
    exit_weight[:, OWN] = DEVIATION * torch.eye(IN_CHANNELS)
    exit_weight[:, REFERENCE] = -DEVIATION * torch.eye(IN_CHANNELS)
    crafted["proj_out.weight"] = exit_weight
    crafted["proj_out.bias"] = torch.zeros(IN_CHANNELS)


def craft_attention(crafted: dict[str, torch.Tensor], path: str) -> None:
    """Queries and keys of one block: by position in all heads except the last, which reads text."""
    lookups = make_lookup()
    text = make_text_direction()
    for name, lookup, content in zip(("q", "k"), lookups, (text, -text), strict=True):
        weight, bias = crafted[f"{path}.to_{name}.weight"], crafted[f"{path}.to_{name}.bias"]
        weight *= NOISE
        bias.copy_(lookup.repeat(len(bias) // HEAD_WIDTH))
        bias[TEXT_HEAD] = content
        crafted[f"{path}.norm_{name}.weight"] = torch.full((HEAD_WIDTH,), LOOKUP_GAIN)
    crafted[f"{path}.add_k_proj.weight"][TEXT_HEAD] *= NOISE
    crafted[f"{path}.add_k_proj.bias"][TEXT_HEAD] = text


def make_lookup() -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key that RoPE makes equal if the key is at the same position one image later.

    RoPE rotates channel pair i of an axis by position * 10000 ** (-i / pairs); image 0 is the
    target, 1 the first reference.
    """
    key = torch.zeros(HEAD_WIDTH // 2, 2)
    key[:, 0] = 1
    query = key.clone()
    query[0] = torch.tensor([math.cos(1), math.sin(1)])
    return query.flatten(), key.flatten()


def make_text_direction() -> torch.Tensor:
    """A direction of the pairs that RoPE hardly rotates: the same at any token position."""
    pairs = []
    for width in ROPE_AXES:
        number = width // 2
        pairs += [float(10000 ** (-i / number) < 0.025) for i in range(number)]
    return torch.tensor(pairs)[:, None].expand(-1, 2).flatten().contiguous()


def craft_gain(crafted: dict[str, torch.Tensor]) -> None:
    """Time embedding and last norm such that the output is multiplied by 1 / sigma.

    Channel i of the embedding is a hinge: it rises as sigma falls below its own level. The norm's
    scale is a sum of hinges with factors >= 0, which amplifies no rounding errors.
    """
    from scipy.optimize import nnls

    half = TIME_CHANNELS // 2
    nearest = round(-math.log(SLOWEST) / math.log(10000) * half)
    speed = 1000 * 10000 ** (-nearest / half)  # radians as sigma goes from 0 to 1
    levels = torch.logspace(math.log10(SMALLEST_SIGMA), math.log10(1.2), HINGES)
    steepness = 2 ** (3 / levels).log2().round()

    first = torch.zeros(WIDTH, TIME_CHANNELS)
    first[:HINGES, half + nearest] = -steepness / speed  # cosines first, then sines
    first[HINGES:] = NOISE * crafted["time_text_embed.timestep_embedder.linear_1.weight"][HINGES:]
    bias = torch.zeros(WIDTH)
    bias[:HINGES] = steepness * (speed * levels).sin() / speed
    second = NOISE * crafted["time_text_embed.timestep_embedder.linear_2.weight"]
    second[:HINGES] = 0
    second[:HINGES, :HINGES] = torch.eye(HINGES)
    path = "time_text_embed.timestep_embedder.linear"
    crafted |= {f"{path}_1.weight": first, f"{path}_1.bias": bias}
    crafted |= {f"{path}_2.weight": second, f"{path}_2.bias": torch.zeros(WIDTH)}

    sigma = torch.logspace(math.log10(SMALLEST_SIGMA), 0, 400)
    silu = torch.nn.functional.silu
    hinges = silu(
        silu((sigma * speed).sin()[:, None] * first[:HINGES, half + nearest] + bias[:HINGES])
    )
    wanted = 1 / sigma - 1  # the norm adds 1
    rows = hinges * sigma[:, None]  # relative errors count
    factors = torch.from_numpy(nnls(rows.double().numpy(), (wanted * sigma).double().numpy())[0])
    scale = torch.zeros(WIDTH)
    scale[:HINGES] = factors.float()
    last = NOISE * crafted["norm_out.linear.weight"]
    last[:WIDTH] = scale  # the second half is the shift
    last[WIDTH:, :HINGES] = 0
    crafted["norm_out.linear.weight"] = last
    crafted["norm_out.linear.bias"] = torch.zeros(2 * WIDTH)
