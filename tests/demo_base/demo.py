"""`dev.py demo`: a real ComfyUI edits a photograph without and with a LoRA, on the tiny base.

The base is tiny: it reproduces the photograph, and a LoRA trained by our engine grades its colours
(see README.md). The same workflow runs on the official files of these names.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from .layout import make_base_directory, make_models, write_public_lora
from .server import ComfyServer, PromptError, ServerError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / ".demo"
WORKFLOW = ROOT / "workflows" / "1 Apply a LoRA.json"
APPLY_NODE = "QwenEditLoraApply"
PROMPTS = {"inflate the man": "make it the blue hour"}  # the workflow's -> what the demo LoRA does
STEPS = 4  # of the workflow's 20: the tiny base shows the same, in a fifth of the time
PROMPT_TIMEOUT = 600.0  # seconds


class DemoError(Exception):
    """Something the user can act on; its text is the whole message."""


def main(argv: list[str]) -> int:
    """Runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(prog="dev.py demo")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port", type=int)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both stop the server
    try:
        run_demo(options.serve, options.port)
    except (DemoError, ServerError, PromptError) as error:
        say(f"demo: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def say(text: str) -> None:
    """Prints one line at once."""
    print(text, flush=True)


def run_demo(serve: bool, port: int | None) -> None:
    """Renders before.png and after.png; with `serve` keeps the server until interrupted."""
    if not WORKFLOW.is_file():
        raise DemoError(f"needs {WORKFLOW.relative_to(ROOT)}, which this checkout does not have.")
    workflow = json.loads(WORKFLOW.read_text())
    comfyui_path = os.environ["COMFYUI_PATH"]
    make_base_directory(DEMO, ROOT)
    say("Preparing the tiny Qwen-Image-Edit base ...")
    make_models(DEMO / "models", sys.executable, comfyui_path)
    write_public_lora(DEMO / "models" / "loras", workflow)
    say("Starting ComfyUI ...")
    with ComfyServer.start(DEMO, sys.executable, comfyui_path, port) as server:
        server.wait_ready()
        graph = adapt_to_demo(convert_workflow(workflow, server.get("/object_info")))
        for name, picture_graph in (("before", set_strength(graph, 0.0)), ("after", graph)):
            start = time.monotonic()
            path = DEMO / f"{name}.png"
            path.write_bytes(render(server, picture_graph))
            say(f"{name}: {path} ({time.monotonic() - start:.1f} s)")
        say(describe_difference(DEMO / "before.png", DEMO / "after.png"))
        if serve:
            say(f"Open {server.url} and choose Templates > qwen-edit-lora. Ctrl-C ends it.")
            while True:
                server.check_alive()
                time.sleep(1)
        say(f"The address was {server.url}; `python3 dev.py demo --serve` keeps it open for you.")


def convert_workflow(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The graph the server runs, from the workflow a user opens.

    Only the library function of comfy-cli is used: its command line reports usage, this does not.
    """
    from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api

    try:
        return convert_ui_to_api(workflow, object_info)
    except WorkflowConversionError as error:
        raise DemoError(f"{WORKFLOW.name} cannot be converted: {error}") from None


def adapt_to_demo(graph: dict[str, Any]) -> dict[str, Any]:
    """A copy of the graph with few steps and a prompt that says what the demo LoRA does."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        inputs = node["inputs"]
        if "steps" in inputs:
            inputs["steps"] = STEPS
        if "prompt" in inputs:
            inputs["prompt"] = PROMPTS.get(inputs["prompt"], inputs["prompt"])
    return graph


def set_strength(graph: dict[str, Any], strength: float) -> dict[str, Any]:
    """A copy of the graph in which every Apply node has this strength."""
    graph = copy.deepcopy(graph)
    nodes = [node for node in graph.values() if node["class_type"] == APPLY_NODE]
    if not nodes:
        raise DemoError(f"{WORKFLOW.name} must have a node {APPLY_NODE}, but has none.")
    for node in nodes:
        node["inputs"]["strength"] = strength
    return graph


def render(server: ComfyServer, graph: dict[str, Any]) -> bytes:
    """The first image the graph saves."""
    images = server.images(server.run_prompt(graph, PROMPT_TIMEOUT))
    if not images:
        raise DemoError(f"{WORKFLOW.name} must save an image, but saved none.")
    return images[0]


def describe_difference(before: Path, after: Path) -> str:
    """A message with the mean absolute pixel difference; DemoError if there is none."""
    difference = compute_difference(before.read_bytes(), after.read_bytes())
    if difference == 0:
        raise DemoError(f"the LoRA must change the image, but {after} equals {before}.")
    return f"The LoRA changes a pixel by {difference:.1f} of 255 on average."


def compute_difference(before: bytes, after: bytes) -> float:
    """Mean absolute difference of two images of the same size, in steps of 255."""
    from PIL import Image, ImageChops, ImageStat

    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in (before, after)]
    means = ImageStat.Stat(ImageChops.difference(*pictures)).mean
    return sum(means) / len(means)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
