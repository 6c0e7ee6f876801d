"""Renders the images of the panel, web/docs/images/panel_*.jpg, from trainings on the demo base.

    cd tests; COMFYUI_PATH=... python -m demo_base.panel_screens [--steps N]

Needs a Chromium on PATH or in CHROMIUM_PATH. Run it again when the panel looks different.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from .demo import DEMO, PROMPT_TIMEOUT, ROOT, convert_workflow
from .frontend import TAB_BUTTON
from .layout import make_base_directory, make_models
from .server import ComfyServer
from .thumbnails import QUALITY, override

WORKFLOW = ROOT / "workflows" / "6 Train a LoRA.json"
TARGET = ROOT / "web" / "docs" / "images"
NAMES = ("blue hour", "colour grade")  # the last one is shown
SIZE = {"megapixels": 0.0625, "reference_megapixels": 0.0625}
SETTINGS = {"batch_size": 4, "rank": 16, "learning_rate": 1e-3}
TRAINING_TIMEOUT = 1800.0  # seconds
PANEL_PX = 560
HEIGHT_PX = 1080
READY = "window.app?.graph && window.app?.extensionManager"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo_base.panel_screens")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the server too
    comfyui_path = os.environ["COMFYUI_PATH"]
    make_base_directory(DEMO, ROOT)
    make_models(DEMO / "models", sys.executable, comfyui_path)
    with ComfyServer.start(DEMO, sys.executable, comfyui_path) as server:
        object_info = server.wait_ready().get("/object_info")
        graph = convert_workflow(json.loads(WORKFLOW.read_text(encoding="utf-8")), object_info)
        for name in NAMES:
            train(server, graph, name, options.steps)
        shoot(server.url)


def train(server: ComfyServer, graph: dict[str, Any], name: str, steps: int) -> None:
    every = max(1, steps // 5)
    override(graph, {**SIZE, **SETTINGS, "name": name, "steps": steps, "sample_every": every})
    server.run_prompt(graph, PROMPT_TIMEOUT)
    deadline = time.monotonic() + TRAINING_TIMEOUT
    while time.monotonic() < deadline:
        jobs = [j for j in server.get("/qwen_edit_lora/jobs")["jobs"] if j["name"] == name]
        if any(job["status"] == "completed" for job in jobs):
            return
        time.sleep(1)
    raise TimeoutError(f"{name} was not trained in {TRAINING_TIMEOUT:.0f} s")


def shoot(url: str) -> None:
    from playwright.sync_api import sync_playwright

    browser_path = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": HEIGHT_PX})
        page.goto(url)
        page.wait_for_function(READY)
        page.wait_for_timeout(2000)
        page.keyboard.press("Escape")  # the Templates dialog of a fresh user
        page.locator(TAB_BUTTON).click()
        panel = page.locator(".qel-panel")
        widen(page, panel)
        panel.get_by_role("button", name=NAMES[-1]).first.wait_for()
        save(panel, "panel_jobs")
        panel.get_by_role("button", name=NAMES[-1]).first.click()
        panel.locator(".qel-samples img").first.wait_for()
        page.wait_for_timeout(3000)  # the curves and all images
        save(panel, "panel_job")
        panel.get_by_role("tab", name="LoRAs").click()
        row = panel.locator(".qel-adapters .qel-row").first
        row.click()
        page.wait_for_timeout(3000)  # health is filled in behind
        save(panel, "panel_adapters")
        browser.close()


def widen(page: Any, panel: Any) -> None:
    """Drags the edge of ComfyUI's sidebar."""
    box = panel.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] + 1, y)
    page.mouse.down()
    page.mouse.move(box["x"] + PANEL_PX, y, steps=8)
    page.mouse.up()


def save(panel: Any, name: str) -> None:
    from PIL import Image

    image = Image.open(io.BytesIO(panel.screenshot())).convert("RGB")
    image.save(TARGET / f"{name}.jpg", quality=QUALITY)
    sys.stdout.write(f"{name}.jpg\n")


if __name__ == "__main__":
    main(sys.argv[1:])
