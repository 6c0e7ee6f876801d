"""The training steps that `train_step.py` compares, all on the same random weights.

Each `build_*` returns a function that takes one whole step: forward, backward, clipping, AdamW.
"""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from apply import import_extension

import_extension()

from qwen_edit_lora.lora_core.base_model.base_weight import BaseWeight  # noqa: E402
from qwen_edit_lora.lora_core.injection.inject import LoraSettings, inject, plan_injection  # noqa: E402
from qwen_edit_lora.lora_core.training.config import config as configuration  # noqa: E402
from qwen_edit_lora.lora_core.training.data import data_config  # noqa: E402
from qwen_edit_lora.lora_core.training.data.batches import load_repeated  # noqa: E402
from qwen_edit_lora.lora_core.training.data.dataset import (  # noqa: E402
    CachedDataset,
    CachedItem,
    DatasetWriter,
    read_dataset,
)
from qwen_edit_lora.lora_core.training.machine.memory import MemoryMeter  # noqa: E402
from qwen_edit_lora.lora_core.training.model import model_config  # noqa: E402
from qwen_edit_lora.lora_core.training.model.architecture import Architecture  # noqa: E402
from qwen_edit_lora.lora_core.training.model.gradient_checkpointing import adapt_to_memory  # noqa: E402
from qwen_edit_lora.lora_core.training.model.loading import list_leaves, load_leaf  # noqa: E402
from qwen_edit_lora.lora_core.training.model.offload import choose_offloaded  # noqa: E402
from qwen_edit_lora.lora_core.training.model.transformer import EditTransformer, pack  # noqa: E402
from qwen_edit_lora.lora_core.training.model.weight_reader import WeightReader  # noqa: E402
from qwen_edit_lora.lora_core.training.optimizer import optimizer_config  # noqa: E402
from qwen_edit_lora.lora_core.training.run.metrics import StepReport  # noqa: E402
from qwen_edit_lora.lora_core.training.run.trainer import train  # noqa: E402

LEARNING_RATE = 1e-4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Step = Callable[[], Any]


@dataclass
class OurStep:
    """Our step, and the model it trains."""

    model: EditTransformer
    reports: Iterator[StepReport]

    def __call__(self) -> StepReport:
        return next(self.reports)


class RandomBase:
    """Stands in for a `BaseFile`; its weights are generated on the device on request."""

    name = "random weights"
    file = None

    def __init__(self, shapes: dict[str, torch.Size], options: Namespace):
        self.shapes = shapes
        self.where = {"device": options.device, "dtype": DTYPES[options.dtype]}

    def read_weight(self, module_path: str) -> BaseWeight:
        return BaseWeight(self.read_tensor(f"{module_path}.weight"), None)

    def read_tensor(self, key: str) -> torch.Tensor:
        shape = self.shapes[key]
        if len(shape) == 1 and key.endswith(".weight"):
            return torch.ones(shape, **self.where)
        return torch.empty(shape, **self.where).normal_(std=0.02)


def build_transformer(options: Namespace, storage: str) -> torch.nn.Module:
    """diffusers' model with random weights, converted to its storage as when loaded from files."""
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    architecture = Architecture(num_layers=options.blocks, zero_cond_t=options.variant == "2511")
    if options.quick and not options.text_only:  # ComfyUI supports one width only
        architecture = Architecture(
            options.blocks, 32, 2, 64, axes_dims_rope=(4, 14, 14), zero_cond_t=False
        )
    model = architecture.build_empty()
    base = RandomBase({name: p.shape for name, p in model.named_parameters()}, options)
    device = torch.device(options.device)
    torch.manual_seed(0)
    reader = WeightReader(base, device)
    for path in list_leaves(model):
        load_leaf(model, path, reader, storage, DTYPES[options.dtype], device)
    axes = list(architecture.axes_dims_rope)
    model.pos_embed = QwenEmbedRope(theta=10000, axes_dim=axes, scale_rope=True)
    return model.requires_grad_(False)


def share(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module tree that shares the weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_dataset(folder: Path, options: Namespace, text_width: int) -> CachedDataset:
    side = options.side
    item = CachedItem(
        target=torch.randn(16, side, side),
        references=tuple(torch.randn(16, side, side) for _ in range(options.references)),
        text=torch.randn(options.text_tokens, text_width).to(DTYPES[options.dtype]),
    )
    writer = DatasetWriter(folder)
    writer.add("item", item)
    return read_dataset(writer.finish())


def count_flops(tokens: int, text_tokens: int, width: int, blocks: int, rank: int) -> float:
    """FLOPs of one step, forward and backward, each counted once.

    A frozen product costs 2 in the forward and 2 in the backward pass (no gradient of the weight),
    a LoRA's 2 and 4; attention's two products 4 and 8 w per pair of tokens. The 12 w^2 of a token
    are q, k, v, out and both products of the MLP.
    """
    total = tokens + text_tokens
    products = 4 * 12 * width**2 * total
    lora = 6 * rank * (4 * 2 + 2 * 5) * width * total
    attention = 12 * width * total**2
    return float(blocks * (products + lora + attention))


def build_ours(
    model: torch.nn.Module,
    options: Namespace,
    rank: int,
    folder: Path,
    checkpointing: bool | str = True,
    num_offloaded: int = 0,
) -> OurStep:
    """A complete step of `trainer.train`, including reading the sample, checks and metrics.

    Args:
        checkpointing: "auto" chooses by the free memory, as a run with default settings does; the
            step's model shows the choice.
        num_offloaded: number of blocks whose weights are kept in host memory.
    """
    compute_dtype, device = DTYPES[options.dtype], torch.device(options.device)
    ours = EditTransformer(share(model), compute_dtype)
    if num_offloaded:
        indices = choose_offloaded(len(ours.blocks), num_offloaded)
        for index in indices:
            ours.blocks[index].to("cpu")
        ours.offload_blocks(indices, device)
    is_auto = checkpointing == model_config.AUTO
    ours.enable_gradient_checkpointing(True if is_auto else checkpointing)
    settings = LoraSettings(rank=rank)
    injection = inject(ours.transformer, settings, device=device)
    if options.compile:
        for block in ours.blocks:
            block.compile()
    dataset = make_dataset(
        Path(tempfile.mkdtemp(dir=folder)), options, model.config.joint_attention_dim
    )
    config = configuration.TrainConfig(
        name="benchmark",
        output=tempfile.mkdtemp(dir=folder),
        model=model_config.ModelConfig(source="random", compute_dtype=options.dtype),
        data=data_config.DataConfig(folder=str(dataset.folder)),
        steps=10**6,
        lora=settings,
        optimizer=optimizer_config.OptimizerConfig(learning_rate=LEARNING_RATE),
        saving=configuration.SavingConfig(checkpoint_every=10**6, adapter_every=0, health_every=0),
    )
    if is_auto:
        batch = load_repeated(dataset, 0, 1, config.seed).to(device)
        free_bytes = MemoryMeter(device).find_free()
        num_parameters = injection.plan.num_parameters
        adapt_to_memory(
            ours,
            batch,
            num_blocks=len(ours.blocks),
            num_parameters=num_parameters,
            free_bytes=free_bytes,
        )
    return OurStep(ours, train(config, ours, injection, dataset))


def build_plain(
    model: torch.nn.Module, options: Namespace, rank: int, kind: str, checkpointing: bool = True
) -> Step:
    """As diffusers' LoRA scripts, with references: diffusers' forward, PEFT's layers, AdamW.

    Args:
        kind: "script", as in diffusers' and FlyMyAI's scripts: LoRA in the base's dtype, and
            under autocast if that is bf16; "fp32 LoRA", weights that keep small updates.
    """
    from peft import LoraConfig

    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    plan = plan_injection(model, LoraSettings(rank=rank))
    plain = share(model)
    paths = [target.module_path for target in plan.targets]
    plain.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths))
    if checkpointing:
        plain.enable_gradient_checkpointing()
    plain.train()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.float32 if kind == "fp32 LoRA" else dtype)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    side, width = options.side, model.config.joint_attention_dim
    images = [torch.randn(1, 16, side, side, device=device) for _ in range(options.references)]
    x_0 = torch.randn(1, 16, side, side, device=device)
    text = torch.randn(1, options.text_tokens, width, device=device, dtype=dtype)
    shapes = [[(1, side // 2, side // 2)] * (1 + options.references)]
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=kind == "script" and dtype == torch.bfloat16
    )

    def step() -> None:
        noise, sigma = torch.randn_like(x_0), torch.rand(1, device=device)
        noisy = (1 - sigma) * x_0 + sigma * noise
        tokens = torch.cat([pack(x.to(dtype)) for x in (noisy, *images)], dim=1)
        with autocast:
            out = plain(
                hidden_states=tokens,
                encoder_hidden_states=text,
                timestep=sigma,
                img_shapes=shapes,
                return_dict=False,
            )[0][:, : (side // 2) ** 2]
        loss = (out.float() - pack(noise - x_0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def run_comfyui(
    model: torch.nn.Module,
    options: Namespace,
    rank: int,
    folder: Path,
    between: Callable[[], None],
    num_steps: int,
) -> None:
    """ComfyUI's TrainLoraNode on the same weights; `between` is called after each of its steps.

    It trains without references (with them it fails), with a LoRA on every Linear: it offers no
    choice of targets.
    """
    import comfy.sd
    from comfy_extras.nodes_train import TrainLoraNode
    from safetensors.torch import save_file
    from torch.optim.optimizer import register_optimizer_step_post_hook

    path = folder / "comfyui.safetensors"
    save_file({name: p.data for name, p in model.named_parameters()}, path)
    dtype = DTYPES[options.dtype]
    patcher = comfy.sd.load_diffusion_model(str(path), {"dtype": dtype})
    text = torch.randn(1, options.text_tokens, model.config.joint_attention_dim)
    latents = {"samples": torch.randn(1, 16, 1, options.side, options.side)}
    chosen: dict[str, Any] = {
        "model": patcher,
        "latents": latents,
        "positive": [[text, {}]],
        "batch_size": 1,
        "steps": num_steps,
        "grad_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "rank": rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": options.dtype,
        "lora_dtype": options.dtype,
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": True,
        "checkpoint_depth": 2,  # the blocks; 1 would keep one input for the whole model
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    owner: list[int] = []

    def after_step(optimizer: Any, *_: Any) -> None:
        owner.append(id(optimizer)) if not owner else None
        if owner[0] == id(optimizer):  # the first to step is the node's; ours step inside `between`
            between()

    hook = register_optimizer_step_post_hook(after_step)
    try:
        TrainLoraNode.execute(**{name: [value] for name, value in chosen.items()})
    finally:
        hook.remove()


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def count_frozen(model: torch.nn.Module) -> Iterator[int]:
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.numel() * tensor.dtype.itemsize
