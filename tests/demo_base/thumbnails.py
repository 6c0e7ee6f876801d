"""Renders the images of the Templates dialog, workflows/*.jpg, from real runs on the demo base.

    cd tests; COMFYUI_PATH=... python -m demo_base.thumbnails [NAME ...] [--steps N]

Each workflow runs as a user opens it, except for the changes here. Run it again when the weights of
the demo base change.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo import DEMO, PROMPT_TIMEOUT, ROOT, convert_workflow, set_strength
from .layout import make_base_directory, make_models, write_public_lora
from .server import ComfyServer

if TYPE_CHECKING:
    from PIL import Image

SIZE_PX = 400
GAP_PX = 2
TRAINING_STEPS = 240
QUALITY = 88  # of the JPEG
DEEP_LORA = "thumbnail_deep.safetensors"
WORKFLOWS = ROOT / "workflows"

#: Workflows of models that the demo base is not, and whose nodes ComfyUI 0.30 lacks -> what runs.
STAND_INS = {"8 Apply a LoRA (Qwen-Image-2.1)": "1 Apply a LoRA"}

Graph = dict[str, Any]
Render = Callable[[Graph], "list[Image.Image]"]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo_base.thumbnails")
    names = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--steps", type=int, help="sampling steps, instead of the workflow's")
    parser.add_argument("--megapixels", type=float, help="likewise, where a workflow has it")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.names) - set(names))
    if unknown:
        parser.error(f"no workflow {unknown[0]}; expected some of {', '.join(names)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the server too
    comfyui_path = os.environ["COMFYUI_PATH"]
    make_base_directory(DEMO, ROOT)
    make_models(DEMO / "models", sys.executable, comfyui_path)
    write_deep_lora(DEMO / "models" / "loras" / DEEP_LORA)
    overrides = {"steps": options.steps, "megapixels": options.megapixels}
    with ComfyServer.start(DEMO, sys.executable, comfyui_path) as server:
        object_info = server.wait_ready().get("/object_info")
        for name in options.names or names:
            source = WORKFLOWS / f"{STAND_INS.get(name, name)}.json"
            workflow = json.loads(source.read_text(encoding="utf-8"))
            write_public_lora(DEMO / "models" / "loras", workflow)
            graph = convert_workflow(workflow, object_info)
            override(graph, overrides)
            thumbnail = DRAW.get(name, draw_first)(graph, lambda graph: run(server, graph))
            thumbnail.save(WORKFLOWS / f"{name}.jpg", quality=QUALITY)
            sys.stdout.write(f"{name}.jpg\n")


def override(graph: Graph, values: dict[str, Any]) -> None:
    for node in graph.values():
        inputs = node["inputs"]
        inputs |= {k: v for k, v in values.items() if v is not None and k in inputs}


def run(server: ComfyServer, graph: Graph) -> list[Image.Image]:
    """The images a graph saves, then those it shows."""
    from PIL import Image

    found = server.images(server.run_prompt(graph, PROMPT_TIMEOUT))
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in found]


def draw_first(graph: Graph, render: Render) -> Image.Image:
    return fit(render(graph)[0])


def draw_before_and_after(graph: Graph, render: Render) -> Image.Image:
    return draw_bands([render(set_strength(graph, 0.0))[0], render(graph)[0]])


def draw_deep(graph: Graph, render: Render) -> Image.Image:
    """Uses a LoRA with all 60 blocks: the demo's two would leave the map of the blocks empty."""
    override(graph, {"lora_name": DEEP_LORA})
    return draw_first(graph, render)


def draw_strengths(graph: Graph, render: Render) -> Image.Image:
    graph, sweep = keep_sweep(graph)
    strengths = [f"{float(text):g}" for text in sweep["strengths"].split(",")]
    return draw_bands(render(graph)[: len(strengths)], strengths)  # saved ones come first


def draw_two_strengths(graph: Graph, render: Render) -> Image.Image:
    return draw_bands([render(set_strength(graph, s))[0] for s in (0.0, 1.0)], ["0", "1"])


def draw_checkpoints(graph: Graph, render: Render) -> Image.Image:
    """The source, and each checkpoint at strength 1."""
    graph, sweep = keep_sweep(graph)
    sweep["strengths"] = "1"
    files = sorted((DEMO / "models" / "loras").glob(f"{sweep['loras'].strip()}.safetensors"))
    steps = [path.stem.rpartition("-")[2].lstrip("0") for path in files]
    return draw_bands(render(graph), ["0", *steps])


def draw_loss(graph: Graph, render: Render) -> Image.Image:
    """The loss plot of a short training."""
    shorten_training(graph)
    kept = {id: n for id, n in graph.items() if n["class_type"] != "PreviewImage"}
    return fit(render(kept)[-1])


def draw_trained_strengths(graph: Graph, render: Render) -> Image.Image:
    shorten_training(graph)
    return draw_strengths(graph, render)


def shorten_training(graph: Graph) -> None:
    """Enough steps to be informative, on small images, waiting for the end."""
    from .edit import BATCH, RANK

    size = {"megapixels": 0.0625, "reference_megapixels": 0.0625}
    settings = {"batch_size": BATCH, "rank": RANK, "learning_rate": 2e-3, "sample_every": 0}
    for node in graph.values():
        if node["class_type"] == "QwenEditDataset":
            node["inputs"] |= size
        elif node["class_type"] == "QwenEditLoraTrain":
            node["inputs"] |= {**settings, "steps": TRAINING_STEPS, "name": "thumbnail"}
        elif node["class_type"] == "QwenEditLoraJob":
            node["inputs"]["wait"] = True


#: workflow -> how its image is made; for any other it is the first output image.
DRAW: dict[str, Callable[[Graph, Render], Image.Image]] = {
    "1 Apply a LoRA": draw_before_and_after,
    "2 Inspect a LoRA": draw_deep,
    "3 Compare and resize LoRAs": draw_deep,
    "4 Find the strength": draw_strengths,
    "5 Compare checkpoints": draw_checkpoints,
    "6 Train a LoRA": draw_loss,
    "7 Train and sweep": draw_trained_strengths,
    "8 Apply a LoRA (Qwen-Image-2.1)": draw_two_strengths,
}


def keep_sweep(graph: Graph) -> tuple[Graph, dict[str, Any]]:
    """The graph up to its sweep, whose images are saved one by one; and the sweep's inputs."""
    ((sweep_id, sweep),) = (
        (id, node) for id, node in graph.items() if node["class_type"] == "QwenEditLoraSweep"
    )
    save = {"images": [sweep_id, 0], "filename_prefix": "thumbnail"}
    kept = find_ancestors(graph, sweep_id) | {sweep_id}
    shown = {id: node for id, node in graph.items() if id in kept}
    return {**shown, "save": {"class_type": "SaveImage", "inputs": save}}, sweep["inputs"]


def find_ancestors(graph: Graph, node_id: str) -> set[str]:
    links = (v for v in graph[node_id]["inputs"].values() if isinstance(v, list))
    return {id for link in links for id in {link[0], *find_ancestors(graph, link[0])}}


def draw_bands(pictures: Sequence[Image.Image], labels: Sequence[str] = ()) -> Image.Image:
    """The same square cut into vertical bands, each from another image, with its label below."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    if labels and len(labels) != len(pictures):
        raise ValueError(f"expected a label for each of {len(pictures)} images, got {labels}")
    edges = [round(SIZE_PX * index / len(pictures)) for index in range(len(pictures) + 1)]
    thumbnail = Image.new("RGB", (SIZE_PX, SIZE_PX), "white")
    draw = ImageDraw.Draw(thumbnail, "RGBA")
    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"), 26)
    for index, picture in enumerate(pictures):
        left, right = edges[index] + (GAP_PX if index else 0), edges[index + 1]
        thumbnail.paste(fit(picture).crop((left, 0, right, SIZE_PX)), (left, 0))
        if labels:
            center = ((left + right) // 2, SIZE_PX - 28)
            box = draw.textbbox(center, labels[index], font, anchor="mm")
            draw.rounded_rectangle((box[0] - 8, box[1] - 6, box[2] + 8, box[3] + 6), 6, "#000000a0")
            draw.text(center, labels[index], font=font, fill="white", anchor="mm")
    return thumbnail


def fit(picture: Image.Image) -> Image.Image:
    """The central square of an image."""
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)


def write_deep_lora(path: Path) -> None:
    """A LoRA of 60 blocks, stronger in later blocks and with a decaying spectrum."""
    import torch
    from safetensors.torch import load_file, save_file

    from .adapters import make_adapter
    from .dit import METADATA, list_lora_targets

    shapes = {path.split(".", 2)[2]: shape for path, shape in list_lora_targets().items()}
    targets = {f"transformer_blocks.{b}.{n}": s for b in range(60) for n, s in shapes.items()}
    state_dict = load_file(make_adapter(path, targets, rank=16, dtype=torch.float32))
    falling = 0.75 ** torch.arange(16.0)
    for key, tensor in state_dict.items():
        block, name = key.split(".", 3)[2:]
        if key.endswith("lora_B.weight"):
            wave = math.sin(len(name) + int(block) / 9)
            state_dict[key] = tensor * falling * 2 ** (int(block) / 30 + wave)
    save_file({key: t.bfloat16() for key, t in state_dict.items()}, path, METADATA)


if __name__ == "__main__":
    main(sys.argv[1:])
