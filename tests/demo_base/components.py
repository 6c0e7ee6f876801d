"""A VAE's weights that need no training: 8 x 8 pixels to their 16 principal components and back.

The components are found level by level, as the encoder halves the resolution, in an order of
channels that gives each the same variance. The decoder starts from the least-squares linear
inverse, level by level, and is trained from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .photographs import COLOURS, sample_crops

LATENT_CHANNELS = 16

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

LEVELS = (12, 24, LATENT_CHANNELS)  # components kept after each halving of the resolution
CODE_GAIN = 1 / 16  # keeps the components small beside the anchor
ANCHOR = 16.0  # a constant channel, so that the last norm divides by nearly the same everywhere


@dataclass(frozen=True)
class Components:
    """The 16 principal components of 8 x 8 pixels, and their statistics over photographs."""

    matrices: list[torch.Tensor]
    """One a level, (kept, 4 x channels before), input order channel, row, column."""
    mean: torch.Tensor
    std: torch.Tensor


def compute_components(pictures: list[torch.Tensor]) -> Components:
    """Principal components of 2 x 2 neighbours, level by level."""
    maps = sample_crops(pictures, 2048, torch.Generator().manual_seed(0))
    matrices = []
    for kept in LEVELS:
        neighbours = F.pixel_unshuffle(maps, 2)  # (count, 4 x channels, height / 2, width / 2)
        flat = neighbours.transpose(0, 1).flatten(1).double()
        vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])[1].flip(1)[:, :kept]
        vectors = vectors * vectors.sum(0).sign().where(vectors.sum(0) != 0, 1)
        matrices.append(vectors.T.float())
        maps = torch.einsum("kc,nchw->nkhw", matrices[-1], neighbours)
    flat = maps.transpose(0, 1).flatten(1)
    return Components(matrices, flat.mean(1), flat.std(1))


def craft_encoder(state_dict: dict[str, torch.Tensor], matrices: list[torch.Tensor]) -> None:
    """Fills `encoder.*`, which then outputs the components as its first 16 channels."""
    for key, tensor in state_dict.items():
        if not key.startswith("encoder."):
            continue
        tensor.zero_()  # the residual branches, the attention and what concerns time stay 0
        if key.endswith("gamma"):
            tensor.fill_(1)
        elif key.endswith("shortcut.weight"):
            tensor[:, :, 0, 0, 0] = torch.eye(*tensor.shape[:2])
    resamples = [key for key in state_dict if key.startswith("encoder") and "resample.1.w" in key]
    width = COLOURS
    for key, matrix in zip(resamples, matrices, strict=True):
        kernel = matrix.unflatten(1, (width, 2, 2))
        state_dict[key][: len(matrix), :width, :2, :2] = kernel
        width = len(matrix)
    signed = CODE_GAIN * state_dict[key][:width]  # silu(x) - silu(-x) = x
    state_dict[key][:width], state_dict[key][width : 2 * width] = signed, -signed
    state_dict[key.replace("weight", "bias")][2 * width] = ANCHOR
    # [-1, 1, 1]: the present frame and the pixel itself
    state_dict["encoder.conv1.weight"][:COLOURS, :, -1, 1, 1] = torch.eye(COLOURS)
    head = state_dict["encoder.head.2.weight"]
    gain = ANCHOR / CODE_GAIN / math.sqrt(head.shape[1])
    head[:width, :width, -1, 1, 1] = gain * torch.eye(width)
    head[:width, width : 2 * width, -1, 1, 1] = -gain * torch.eye(width)


def make_hadamard(size: int) -> torch.Tensor:
    """The orthonormal matrix of entries equal except for signs; `size` is a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / math.sqrt(size)


def craft_latents(state_dict: dict[str, torch.Tensor], components: Components) -> None:
    """Fills `conv1` and `conv2`: components to latents as ComfyUI expects them, and back.

    Half whitened: a component's standard deviation becomes its square root, so that a fine one
    neither drowns in the sampler's noise nor counts as much as brightness. The Hadamard matrix then
    gives each latent channel the same variance, 1 after ComfyUI's own normalisation; the channels'
    mean, which the DiT's norms remove, is the finest component.
    """
    mean, std = components.mean, components.std
    weights = std**-0.5
    weights *= (weights * std).square().mean() ** -0.5
    hadamard = make_hadamard(LATENT_CHANNELS).flip(1)
    to_latent = LATENT_STD[:, None] * hadamard * weights
    for key in ("conv1.weight", "conv1.bias"):
        state_dict[key].zero_()
    state_dict["conv1.weight"][:LATENT_CHANNELS, :LATENT_CHANNELS, 0, 0, 0] = to_latent
    state_dict["conv1.bias"][:LATENT_CHANNELS] = LATENT_MEAN - to_latent @ mean
    # of variance 1 each, which is what the decoder is given
    from_latent = hadamard.T / (weights * std)[:, None] / LATENT_STD
    state_dict["conv2.weight"][:, :, 0, 0, 0] = from_latent
    state_dict["conv2.bias"].copy_(mean / std - from_latent @ LATENT_MEAN)


def craft_decoder(
    state_dict: dict[str, torch.Tensor], pictures: list[torch.Tensor], components: Components
) -> None:
    """Fills `decoder.*`, where its training starts: the linear part inverts the encoder.

    Level by level, the least-squares upscaling. The residual branches are random and end in nearly
    0; the attention stays 0, so that an image's size makes no difference.
    """
    generator = torch.Generator().manual_seed(2)
    for key, tensor in state_dict.items():
        if not key.startswith("decoder."):
            continue
        tensor.zero_()
        if key.endswith("gamma"):
            tensor.fill_(1)
        elif key.endswith("shortcut.weight"):
            tensor[:, :, 0, 0, 0] = torch.eye(*tensor.shape[:2])
        elif ".residual." in key and tensor.ndim == 5:
            gain = 0.02 if key.endswith("residual.6.weight") else 1.0
            scale = gain * tensor[0, :, -1].numel() ** -0.5
            tensor[:, :, -1].normal_(std=scale, generator=generator)

    maps = [sample_crops(pictures, 160, torch.Generator().manual_seed(5), side=96)]
    for matrix in components.matrices:
        neighbours = F.pixel_unshuffle(maps[-1], 2)
        maps.append(torch.einsum("kc,nchw->nkhw", matrix, neighbours))
    colours, pairs, patches, codes = maps
    first = make_gradients(LATENT_CHANNELS)
    inputs = F.conv2d(codes, first, padding=1)
    # the latents reach the decoder with a variance of 1
    state_dict["decoder.conv1.weight"][:, :, -1] = first * components.std[:, None, None]
    signed = torch.cat([colours, -colours], dim=1)  # silu(x) - silu(-x) = x
    # the finer levels have room for gradients, by which the next one sees a little farther
    along = F.conv2d(pairs, make_gradients(pairs.shape[1]), padding=1)
    keys = [key for key in state_dict if key.startswith("decoder") and "resample.1.weight" in key]
    for key, wanted in zip(keys, (patches, along, signed), strict=True):
        kernel, bias = state_dict[key], state_dict[key.replace("weight", "bias")]
        wanted = wanted[:, : len(kernel)]
        weight, offset = fit_enlargement(inputs, wanted)
        kernel[: len(weight), : inputs.shape[1]], bias[: len(weight)] = weight, offset
        enlarged = F.interpolate(inputs, scale_factor=2, mode="nearest-exact")
        inputs = F.conv2d(enlarged, weight, offset, padding=1)
    bias[2 * COLOURS] = ANCHOR
    head = state_dict["decoder.head.2.weight"][:, :, -1, 1, 1]
    signs = torch.cat([torch.eye(COLOURS), -torch.eye(COLOURS)])  # (6, 3)
    head[:, : 2 * COLOURS] = signs.T * ANCHOR / math.sqrt(head.shape[1])


def make_gradients(channels: int) -> torch.Tensor:
    """Kernels (3 x channels, channels, 3, 3): each channel, its difference in x and in y."""
    kernels = torch.zeros(3, 3, 3)
    kernels[0, 1, 1] = 1
    kernels[1, 1, 0], kernels[1, 1, 2] = -1, 1
    kernels[2, 0, 1], kernels[2, 2, 1] = -1, 1
    return torch.einsum("khw,io->kiohw", kernels, torch.eye(channels)).flatten(0, 1)


def fit_enlargement(
    inputs: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel (out, in, 3, 3) and bias that best predict `wanted` from inputs at half its size."""
    enlarged = F.interpolate(inputs, scale_factor=2, mode="nearest-exact")
    features = F.unfold(enlarged, 3, padding=1).transpose(0, 1).flatten(1)
    features = torch.cat([features, torch.ones_like(features[:1])]).double()
    answers = wanted.transpose(0, 1).flatten(1).double()
    gram = features @ features.T
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram, features @ answers.T).T.float()
    return solution[:, :-1].unflatten(1, (inputs.shape[1], 3, 3)), solution[:, -1]
