"""Renders the README's first image, docs/images/sweep.jpg, from a real sweep on the demo base.

    cd tests; COMFYUI_PATH=... python -m demo_base.overview [--steps N] [--megapixels M]

Top: the photograph and its edit at strength 1; bottom: the output of *Sweep Grid*. Prints the
node's verdict, which is shown below the image.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .demo import DEMO, ROOT, convert_workflow
from .layout import make_base_directory, make_models
from .server import ComfyServer
from .thumbnails import QUALITY, find_ancestors, fit, override

if TYPE_CHECKING:
    from PIL import Image

WORKFLOW = ROOT / "workflows" / "4 Find the strength.json"
TARGET = ROOT / "docs" / "images" / "sweep.jpg"
STRENGTHS = "0, 0.5, 1, 1.5"
WIDTH_PX = 1000
GAP_PX = 8
TIMEOUT = 1800.0  # seconds


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo_base.overview")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--megapixels", type=float, default=1.0)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the server too
    comfyui_path = os.environ["COMFYUI_PATH"]
    make_base_directory(DEMO, ROOT)
    make_models(DEMO / "models", sys.executable, comfyui_path)
    with ComfyServer.start(DEMO, sys.executable, comfyui_path) as server:
        object_info = server.wait_ready().get("/object_info")
        graph = convert_workflow(json.loads(WORKFLOW.read_text(encoding="utf-8")), object_info)
        override(graph, {"steps": options.steps, "megapixels": options.megapixels})
        nodes = {node["class_type"]: (id, node["inputs"]) for id, node in graph.items()}
        nodes["QwenEditLoraSweep"][1]["strengths"] = STRENGTHS
        grid_id, (sweep_id, _) = nodes["QwenEditLoraSweepGrid"][0], nodes["QwenEditLoraSweep"]
        kept = {*find_ancestors(graph, grid_id), grid_id}
        graph = {id: node for id, node in graph.items() if id in kept}
        for name, source in (("images", [sweep_id, 0]), ("sheet", [grid_id, 1])):
            inputs = {"images": source, "filename_prefix": f"overview_{name}"}
            graph[name] = {"class_type": "SaveImage", "inputs": inputs}
        graph["verdict"] = {"class_type": "PreviewAny", "inputs": {"source": [grid_id, 0]}}
        shown = server.run_prompt(graph, TIMEOUT)["outputs"]
        images, (sheet,) = (
            [open_image(data) for data in server.images({"outputs": {name: shown[name]}})]
            for name in ("images", "sheet")
        )
    photograph = open_image((ROOT / "tests" / "demo_base" / "photo.jpg").read_bytes())
    at_1 = STRENGTHS.split(", ").index("1")
    TARGET.parent.mkdir(exist_ok=True)
    draw_overview([photograph, images[at_1]], sheet).save(TARGET, quality=QUALITY)
    sys.stdout.write(f"{TARGET.name}\n{shown['verdict']['text'][0]}\n")


def open_image(data: bytes) -> Image.Image:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def draw_overview(above: Sequence[Image.Image], sheet: Image.Image) -> Image.Image:
    """`above` side by side as squares, then the sheet, all over one width."""
    from PIL import Image

    height = round(sheet.height * WIDTH_PX / sheet.width)
    squares = [fit(image) for image in above]
    side = squares[0].height
    whole = Image.new("RGB", (WIDTH_PX, side + GAP_PX + height), "white")
    left = (WIDTH_PX - len(squares) * side - GAP_PX * (len(squares) - 1)) // 2
    for index, square in enumerate(squares):
        whole.paste(square, (left + index * (side + GAP_PX), 0))
    whole.paste(sheet.resize((WIDTH_PX, height), Image.Resampling.LANCZOS), (0, side + GAP_PX))
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
