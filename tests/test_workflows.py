"""What a user sees of a shipped workflow before it runs: where its wires pass, where its files are.

Geometry as LiteGraph draws it: a node's title bar is above its position, a socket is 20 pixels
high, a wire a cubic curve whose handles are a quarter of its length (LGraphCanvas.renderLink).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

WORKFLOWS = sorted((Path(__file__).resolve().parents[1] / "workflows").glob("*.json"))
TITLE = 30
SLOT = 20
NUM_POINTS = 100  # of a wire
BORDER = 4  # pixels that a wire may enter a box: rounded corners, rounding

Box = tuple[float, float, float, float]
Point = tuple[float, float]


def read_workflow(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def compute_box(node: dict[str, Any]) -> Box:
    """Left, top, right, bottom, the title bar included."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def locate_output(node: dict[str, Any], slot: int) -> Point:
    return node["pos"][0] + node["size"][0], node["pos"][1] + SLOT * (slot + 0.7)


def locate_input(node: dict[str, Any], slot: int) -> Point:
    """Inputs that belong to a widget have no row of their own above the widgets."""
    above = [socket for socket in node["inputs"][:slot] if "widget" not in socket]
    return node["pos"][0], node["pos"][1] + SLOT * (len(above) + 0.7)


def trace_curve(start: Point, end: Point, handles: tuple[float, float]) -> list[Point]:
    """Points of a wire; `handles` are 1 at a socket, and 0 at a reroute, where none sticks out."""
    length = ((start[0] - end[0]) ** 2 + (start[1] - end[1]) ** 2) ** 0.5
    xs = (
        start[0],
        start[0] + 0.25 * length * handles[0],
        end[0] - 0.25 * length * handles[1],
        end[0],
    )
    ys = (start[1], start[1], end[1], end[1])
    points = []
    for i in range(NUM_POINTS + 1):
        t = i / NUM_POINTS
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        points.append((dot(weights, xs), dot(weights, ys)))
    return points


def dot(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def trace_links(workflow: dict[str, Any]) -> list[tuple[list[Any], list[Point]]]:
    """Each link with the points of its wire, through its reroutes if it has some."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    wires = []
    for link in workflow["links"]:
        start = locate_output(nodes[link[1]], link[2])
        end = locate_input(nodes[link[3]], link[4])
        stops = [(start, 1.0), *((stop, 0.0) for stop in list_stops(workflow, link[0])), (end, 1.0)]
        points: list[Point] = []
        for (a, handle), (b, other) in itertools.pairwise(stops):
            points += trace_curve(a, b, (handle, other))
        wires.append((link, points))
    return wires


def list_stops(workflow: dict[str, Any], link_id: int) -> list[Point]:
    """Places of a link's reroutes, from its output on: each names the one before it."""
    extra = workflow["extra"]
    reroutes = {reroute["id"]: reroute for reroute in extra.get("reroutes", [])}
    last = {link["id"]: link["parentId"] for link in extra.get("linkExtensions", [])}
    stops: list[Point] = []
    reroute_id = last.get(link_id)
    while reroute_id is not None:
        reroute = reroutes[reroute_id]
        assert link_id in reroute["linkIds"]
        stops.insert(0, tuple(reroute["pos"]))
        reroute_id = reroute.get("parentId")
    return stops


def is_inside(point: Point, box: Box) -> bool:
    left, top, right, bottom = box
    inside_x = left + BORDER < point[0] < right - BORDER
    return inside_x and top + BORDER < point[1] < bottom - BORDER


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_wire_crosses_a_node_that_it_does_not_connect(path):
    workflow = read_workflow(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    crossings = {
        (f"{nodes[link[1]]['type']} -> {nodes[link[3]]['type']} ({link[5]})", node["type"])
        for link, points in trace_links(workflow)
        for node in workflow["nodes"]
        if node["id"] not in (link[1], link[3])
        and any(is_inside(point, compute_box(node)) for point in points)
    }
    assert crossings == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_do_not_overlap_and_a_group_holds_them_whole(path):
    workflow = read_workflow(path)
    for one, other in itertools.combinations(workflow["nodes"], 2):
        a, b = compute_box(one), compute_box(other)
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (one, other)
    for group, node in itertools.product(workflow["groups"], workflow["nodes"]):
        x, y, width, height = group["bounding"]
        left, top, right, bottom = compute_box(node)
        outside = right <= x or x + width <= left or bottom <= y or y + height <= top
        whole = x < left and y < top and right < x + width and bottom < y + height
        assert outside or whole, (group["title"], node["type"])


LOADERS = {
    "UNETLoader": ("diffusion_models", "Comfy-Org/Qwen-Image-Edit_ComfyUI"),
    "CLIPLoader": ("text_encoders", "Comfy-Org/Qwen-Image_ComfyUI"),
    "VAELoader": ("vae", "Comfy-Org/Qwen-Image_ComfyUI"),
    "QwenEditLoraTrain": ("diffusion_models", "Comfy-Org/Qwen-Image-Edit_ComfyUI"),
}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_model_file_of_a_loader_can_be_downloaded_from_the_graph(path):
    """ComfyUI offers a download for what `properties.models` names and a folder lacks."""
    for node in read_workflow(path)["nodes"]:
        if node["type"] not in LOADERS:
            continue
        folder, repository = LOADERS[node["type"]]
        (model,) = node["properties"]["models"]
        if "2.1" in path.stem:
            repository = "Comfy-Org/Qwen-Image-2.1"
        assert model["name"] in node["widgets_values"]
        assert model["directory"] == folder
        assert model["url"].startswith(f"https://huggingface.co/{repository}/resolve/main/")
        assert model["url"].endswith(f"/{folder}/{model['name']}")


def test_the_workflow_of_2_1_says_its_licence_and_starts_with_a_public_lora_of_it():
    (path,) = [path for path in WORKFLOWS if "2.1" in path.stem]
    nodes = read_workflow(path)["nodes"]
    (load,) = [node for node in nodes if node["type"] == "QwenEditLoraLoad"]
    (model,) = load["properties"]["models"]
    assert load["widgets_values"] == [model["name"]]
    assert model["directory"] == "loras"
    (encode,) = [node for node in nodes if node["type"] == "TextEncodeQwenImage21"]
    assert encode["widgets_values"][0] == "Transform the image with balanced neutral exposure"
    notes = "".join(n["widgets_values"][0] for n in nodes if n["type"] == "MarkdownNote")
    assert "non-commercial use only (Qwen Research License)" in notes
    assert "ComfyUI 0.37 or newer" in notes


def test_the_first_workflow_starts_with_a_public_lora_and_its_own_prompt():
    nodes = read_workflow(WORKFLOWS[0])["nodes"]
    (load,) = [node for node in nodes if node["type"] == "QwenEditLoraLoad"]
    (model,) = load["properties"]["models"]
    assert load["widgets_values"] == [model["name"]]
    assert model["directory"] == "loras"
    prompts = [n["widgets_values"] for n in nodes if n["type"] == "TextEncodeQwenImageEditPlus"]
    assert prompts == [["inflate the man"], [""]]
