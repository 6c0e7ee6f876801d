"""The sweep in a running ComfyUI server: its images, and what is rendered, cached and cancelled.

Which nodes ran is taken from the server's own `executing` messages on its websocket.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from demo_base.prompts import node
from demo_base.server import PromptError
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

LORA = "sweep_a.safetensors"
RUN = ("sweep_run/step-9.safetensors", "sweep_run/step-10.safetensors")
SETTINGS = {
    "steps": 2,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "denoise": 1.0,
}


@pytest.fixture(scope="module", autouse=True)
def loras(demo_models: Any) -> Iterator[None]:
    from demo_base.adapters import make_adapter

    for number, name in enumerate((LORA, *RUN)):
        path = demo_models.root / "loras" / name
        make_adapter(path, demo_models.dit["2509_fp32"], rank=8, delta_std=0.3, seed=number)
    yield
    for name in (LORA, *RUN):
        (demo_models.root / "loras" / name).unlink()


def base_graph(size: int = 64) -> dict[str, Any]:
    return {
        "unet": node("UNETLoader", unet_name="tiny_fp32_2509.safetensors", weight_dtype="default"),
        "clip": node(
            "CLIPLoader",
            clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
            type="qwen_image",
            device="default",
        ),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "prompt": node("TextEncodeQwenImageEditPlus", clip=["clip", 0], prompt="red"),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "load": node("QwenEditLoraLoad", lora_name=LORA),
    }


LINKS = {
    "positive": ["prompt", 0],
    "negative": ["prompt", 0],
    "latent_image": ["latent", 0],
    "vae": ["vae", 0],
}


def sweep_graph(strengths: str = "0, 0.5, 1", size: int = 64, **more: Any) -> dict[str, Any]:
    """A sweep whose images and labels are shown; None removes an input."""
    inputs = {
        "model": ["unet", 0],
        "adapter": ["load", 0],
        "strengths": strengths,
        "seed": 1,
        **SETTINGS,
        **LINKS,
        **more,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    return {
        **base_graph(size),
        "sweep": node("QwenEditLoraSweep", **inputs),
        "pictures": node("SaveImage", images=["sweep", 0], filename_prefix="sweep"),
        "labels": node("PreviewAny", source=["sweep", 2]),
    }


def hand_graph(model: list, seed: int = 1, vary: Callable | None = None) -> dict[str, Any]:
    """One image from a hand-wired graph."""
    links = {name: link for name, link in LINKS.items() if name != "vae"}
    graph = {
        **base_graph(),
        "sampler": node("KSampler", model=model, seed=seed, **SETTINGS, **links),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "pictures": node("SaveImage", images=["decoded", 0], filename_prefix="hand"),
    }
    if vary:
        vary(graph)
    return graph


def hand_wired(strength: float, seed: int = 1, lora_name: str = LORA) -> dict[str, Any]:
    graph = hand_graph(["apply", 0], seed)
    graph["load"] = node("QwenEditLoraLoad", lora_name=lora_name)
    graph["apply"] = node(
        "QwenEditLoraApply", model=["unet", 0], adapter=["load", 0], strength=strength
    )
    return graph


class Watcher:
    """A websocket client of the server that keeps its messages."""

    def __init__(self, server: Any, client_id: str):
        self.server, self.client_id = server, client_id
        self.messages: list[dict[str, Any]] = []
        self.previews = 0
        self.ready = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=[self.listen()])

    async def listen(self) -> None:
        self.stop = asyncio.Event()
        url = f"{self.server.url}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            self.ready.set()
            stopped = asyncio.ensure_future(self.stop.wait())
            while not stopped.done():
                received = asyncio.ensure_future(socket.receive())
                await asyncio.wait({received, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not received.done():
                    received.cancel()
                    break
                message = received.result()
                if message.type == aiohttp.WSMsgType.TEXT:
                    self.messages.append(json.loads(message.data))
                elif message.type == aiohttp.WSMsgType.BINARY:
                    self.previews += 1

    def __enter__(self) -> Watcher:
        self.thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()
        self.loop.close()

    def queue(self, graph: dict[str, Any]) -> str:
        body = {"prompt": graph, "client_id": self.client_id}
        return self.server.post("/prompt", body)["prompt_id"]

    def run(self, graph: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The history entry, and the ids of the nodes that ran."""
        prompt_id = self.queue(graph)
        entry = self.server.wait_for_prompt(prompt_id)
        self.wait_for(lambda: prompt_id in self.list_finished())
        return entry, self.list_executed(prompt_id)

    def list_executed(self, prompt_id: str) -> list[str]:
        found = (m["data"] for m in self.messages if m["type"] == "executing")
        return [d["node"] for d in found if d["prompt_id"] == prompt_id and d["node"]]

    def list_finished(self) -> list[str]:
        ends = ("execution_success", "execution_interrupted", "execution_error")
        return [m["data"]["prompt_id"] for m in self.messages if m["type"] in ends]

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "nothing of the kind came"
            time.sleep(0.005)


@pytest.fixture(scope="module")
def watcher(server: Any) -> Iterator[Watcher]:
    with Watcher(server, "sweep-test") as watcher:
        yield watcher


def pick(executed: list[str], what: str) -> list[str]:
    """The cells for which this was executed, without the sweep's own prefix."""
    words = (name.removeprefix("sweep.0.0.").split(" ", 1) for name in executed)
    return [rest[0] for word, *rest in words if word == what and rest]


@pytest.fixture
def render(server: Any) -> Callable[[dict[str, Any]], list[np.ndarray]]:
    """Runs a graph; returns its saved images as arrays."""

    def run(graph: dict[str, Any]) -> list[np.ndarray]:
        return read_pictures(server, server.run_prompt(graph))

    return run


def read_pictures(server: Any, entry: dict[str, Any]) -> list[np.ndarray]:
    import io

    from PIL import Image

    return [np.asarray(Image.open(io.BytesIO(data))) for data in server.images(entry)]


def read_labels(entry: dict[str, Any]) -> list[str]:
    return entry["outputs"]["labels"]["text"]


def test_each_cell_is_the_image_of_the_graph_wired_by_hand(server, render):
    entry = server.run_prompt(sweep_graph("1, -0.5, 0.5", seeds="1, 4"))
    labels, pictures = read_labels(entry), read_pictures(server, entry)
    assert labels == [
        f"strength={strength} seed={seed}" for seed in (1, 4) for strength in ("0", -0.5, 0.5, "1")
    ]
    by_label = dict(zip(labels, pictures, strict=True))
    for seed in (1, 4):
        without = render(hand_graph(["unet", 0], seed))[0]
        assert np.array_equal(by_label[f"strength=0 seed={seed}"], without)
        for strength in (-0.5, 0.5, 1):
            (expected,) = render(hand_wired(strength, seed))
            assert np.array_equal(by_label[f"strength={strength} seed={seed}"], expected)
            assert np.abs(expected.astype(int) - without).max() > 10


def test_a_new_strength_renders_only_that_one(watcher, server):
    _, first = watcher.run(sweep_graph("0, 0.25, 0.75", seed=21))
    assert pick(first, "sample") == pick(first, "decode")
    assert pick(first, "sample") == [f"strength={s} seed=21" for s in (0, 0.25, 0.75)]
    entry, second = watcher.run(sweep_graph("0.75, 0.5, 0.25", seed=21))
    assert read_labels(entry) == [f"strength={s} seed=21" for s in (0, 0.25, 0.5, 0.75)]
    for what in ("sample", "decode"):
        assert pick(second, what) == ["strength=0.5 seed=21"]
    assert {"unet", "prompt", "load", "vae", "latent"}.isdisjoint(second)


def test_the_same_sweep_again_runs_nothing(watcher):
    watcher.run(sweep_graph("0, 0.3", seed=22))
    _, again = watcher.run(sweep_graph("0, 0.3", seed=22))
    assert again == []


def test_the_image_without_the_lora_may_come_from_the_users_own_sampler(watcher):
    graph = sweep_graph("0, 0.3", seed=23)
    by_hand = hand_graph(["unet", 0], 23)
    watcher.run(by_hand)
    _, executed = watcher.run({**by_hand, **graph})
    assert pick(executed, "sample") == ["strength=0.3 seed=23"]


def test_all_latents_come_before_the_first_image_and_adapters_one_after_the_other(watcher):
    graph = sweep_graph("0, 1", seeds="31, 32", loras="sweep_run/*")
    entry, executed = watcher.run(graph)
    expected = [
        *("strength=0 seed=31", "strength=0 seed=32"),
        *("strength=1 seed=31 lora=sweep_a", "strength=1 seed=32 lora=sweep_a"),
        *("strength=1 seed=31 lora=step-9", "strength=1 seed=32 lora=step-9"),
        *("strength=1 seed=31 lora=step-10", "strength=1 seed=32 lora=step-10"),
    ]
    assert pick(executed, "sample") == pick(executed, "decode") == expected
    kinds = [name.removeprefix("sweep.0.0.").split(" ")[0] for name in executed]
    assert max(i for i, k in enumerate(kinds) if k == "sample") < kinds.index("decode")
    # The labels go seed by seed; strength 0 is there once for all three adapters.
    assert read_labels(entry) == expected[0::2] + expected[1::2]


def test_files_of_a_run_are_swept_in_the_order_of_their_steps(server, render):
    entry = server.run_prompt(sweep_graph("0.5", adapter=None, loras="sweep_run/*"))
    assert read_labels(entry) == [
        "strength=0 seed=1",
        "strength=0.5 seed=1 lora=step-9",
        "strength=0.5 seed=1 lora=step-10",
    ]
    for picture, name in zip(read_pictures(server, entry)[1:], RUN, strict=True):
        assert np.array_equal(picture, render(hand_wired(0.5, lora_name=name))[0])


def test_connected_adapters_are_swept_too(server, render):
    graph = sweep_graph("0.5", **{"adapters.adapter_0": ["second", 0]})
    graph["second"] = node("QwenEditLoraLoad", lora_name=RUN[0])
    entry = server.run_prompt(graph)
    assert read_labels(entry)[1:] == [
        "strength=0.5 seed=1 lora=sweep_a",
        "strength=0.5 seed=1 lora=step-9",
    ]
    pictures = read_pictures(server, entry)
    assert np.array_equal(pictures[2], render(hand_wired(0.5, lora_name=RUN[0]))[0])


@pytest.mark.parametrize("below", ["QwenEditLoraApply", "LoraLoaderModelOnly"])
def test_another_lora_below_is_kept(below, server, render):
    inputs = {"model": ["unet", 0]}
    if below == "QwenEditLoraApply":
        inputs |= {"adapter": ["other", 0], "strength": 0.7}
    else:
        inputs |= {"lora_name": RUN[1], "strength_model": 0.7}
    added = {
        "other": node("QwenEditLoraLoad", lora_name=RUN[1]),
        "below": node(below, **inputs),
    }
    entry = server.run_prompt({**sweep_graph("0, 0.5", model=["below", 0]), **added})
    pictures = read_pictures(server, entry)
    assert np.array_equal(pictures[0], render({**hand_graph(["below", 0]), **added})[0])
    by_hand = hand_wired(0.5)
    by_hand["apply"]["inputs"]["model"] = ["below", 0]
    assert np.array_equal(pictures[1], render({**by_hand, **added})[0])


CUSTOM = {
    "euler": node("KSamplerSelect", sampler_name="euler"),
    "levels": node("BasicScheduler", model=["unet", 0], scheduler="beta", steps=3, denoise=1.0),
    "noise": node("RandomNoise", noise_seed=1),
}


@pytest.mark.parametrize("negative", [None, ["other_prompt", 0]])
def test_a_custom_sampler_goes_through_sampler_custom_advanced(negative, server, render):
    other = node("TextEncodeQwenImageEditPlus", clip=["clip", 0], prompt="blue")
    added = {**CUSTOM, "other_prompt": other}
    connected = {"sampler": ["euler", 0], "sigmas": ["levels", 0], "negative": negative}
    sweep = sweep_graph("0, 0.5", **connected, cfg=2.5)
    pictures = read_pictures(server, server.run_prompt({**sweep, **added}))
    if negative is None:
        guider = node("BasicGuider", model=["apply", 0], conditioning=["prompt", 0])
    else:
        guider = node(
            "CFGGuider", model=["apply", 0], positive=["prompt", 0], negative=negative, cfg=2.5
        )
    sampler = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["euler", 0],
        sigmas=["levels", 0],
        latent_image=["latent", 0],
    )
    for strength, picture in zip((0, 0.5), pictures, strict=True):
        by_hand = {**hand_wired(strength), **added, "guider": guider, "sampler": sampler}
        assert np.array_equal(picture, render(by_hand)[0])


def own_sampler_graph() -> dict[str, Any]:
    """The models in the user's own sampler, which ComfyUI runs once per cell."""
    graph = sweep_graph("0, 0.5", seeds="1, 2", **dict.fromkeys(LINKS))
    links = {name: link for name, link in LINKS.items() if name != "vae"}
    inputs = {**SETTINGS, **links, "model": ["sweep", 4], "seed": ["sweep", 5]}
    graph["own"] = node("KSampler", **inputs)
    graph["decoded"] = node("VAEDecode", samples=["own", 0], vae=["vae", 0])
    graph["pictures"] = node("SaveImage", images=["decoded", 0], filename_prefix="own")
    return graph


def test_models_and_seeds_work_with_a_custom_sampler_graph(server, render):
    entry = server.run_prompt(own_sampler_graph())
    assert read_labels(entry) == [f"strength={s} seed={n}" for n in (1, 2) for s in (0, 0.5)]
    expected = [hand_wired(strength, seed) for seed in (1, 2) for strength in (0, 0.5)]
    pictures = read_pictures(server, entry)
    assert len(pictures) == len(expected)
    for picture, graph in zip(pictures, expected, strict=True):
        assert np.array_equal(picture, render(graph)[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict.fromkeys(LINKS), "this sweep makes no images: connect positive, negative, latent"),
        ({"vae": None}, "this sweep makes no images: connect positive, negative, latent"),
        ({"negative": None}, "needs positive, latent_image, negative, and negative is not conn"),
        ({"latent_image": None, "positive": None}, "and positive, latent_image is not connected"),
        ({"sampler": ["euler", 0]}, "and sigmas is not connected"),
        ({"adapter": None}, "there is nothing to sweep; connect an adapter"),
        ({"seeds": "1:40:1"}, r"has 120 images \(2 strengths and 0, 40 seeds, 1 adapter\)"),
    ],
)
def test_missing_or_superfluous_inputs_are_a_one_sentence_error(changes, sentence, server):
    with pytest.raises(PromptError, match=sentence):
        server.run_prompt({**sweep_graph(**changes), **CUSTOM})


BAD_STRENGTHS = ["0..2", "a,b", "0:500:1", "nan", "", "0:2:0", "0:2:-1"]


@pytest.mark.parametrize(
    ("changes", "example"),
    [
        *(({"strengths": text}, "such as '0, 0.5, 1, 2', '0:2:0.25'") for text in BAD_STRENGTHS),
        ({"seeds": "a"}, "seeds is 'a'; expected finite numbers"),
        ({"seeds": "1.5"}, "seeds holds 1.5; expected whole numbers from 0 to"),
        ({"seeds": "1:100:1"}, "seeds asks for 100 values; a sweep has at most 64 images"),
        ({"loras": "no_run/*"}, "'no_run/*' matches none of the"),
        ({"loras": "../*"}, "'../*' matches none of the"),
    ],
)
def test_bad_texts_are_refused_before_anything_runs_with_an_example(changes, example, server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/prompt", {"prompt": sweep_graph(**changes)})
    node_errors = json.loads(refused.value.read())["node_errors"]
    (error,) = node_errors["sweep"]["errors"]  # once, and on the node at fault
    assert example in error["details"]
    assert "\n" not in error["details"]
    assert [n for n, found in node_errors.items() if found["errors"]] == ["sweep"]


def test_a_connected_strengths_text_is_checked_when_it_comes(server):
    graph = {
        **sweep_graph(strengths=["text", 0]),
        "text": node("PrimitiveString", value="0..2"),
    }
    with pytest.raises(PromptError, match=r"strengths is '0\.\.2'; expected finite numbers"):
        server.run_prompt(graph)
    graph["text"]["inputs"]["value"] = "1"
    assert read_labels(server.run_prompt(graph)) == ["strength=0 seed=1", "strength=1 seed=1"]


def test_auto_chooses_the_strengths_by_the_size_of_the_delta(server):
    graph = sweep_graph("auto, 3 points")
    graph["report"] = node("PreviewAny", source=["sweep", 6])
    entry = server.run_prompt(graph)
    # The demo weights have std 1 / sqrt(in): with a delta of std 0.3 the LoRA is far too strong.
    assert read_labels(entry) == ["strength=0 seed=1", "strength=0.05 seed=1", "strength=1 seed=1"]
    (report,) = entry["outputs"]["report"]["text"]
    assert report.startswith("3 images: strengths 0, 0.05, 1\nauto: |delta| of sweep_a")
    assert "24 of 24 modules matched, strength 0.05" in report
    assert "side path: 24 modules" in report


def test_a_list_on_an_input_is_a_one_sentence_error(server):
    graph = own_sampler_graph()
    graph["again"] = node(
        "QwenEditLoraSweep",
        **{**graph["sweep"]["inputs"], "model": ["sweep", 4]},
    )
    graph["again_labels"] = node("PreviewAny", source=["again", 2])
    with pytest.raises(PromptError, match="model got a list of 4 values; expected a single one"):
        server.run_prompt(graph)


def test_a_replaced_file_of_a_run_is_rendered_again(watcher, demo_models, loras):
    path = demo_models.root / "loras" / RUN[0]
    graph = sweep_graph("0, 0.5", seed=41, adapter=None, loras="sweep_run/*")
    watcher.run(graph)
    original = load_file(path)
    weaker = {k: v * 0.5 if "lora_B" in k else v for k, v in original.items()}
    save_file(weaker, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    _, executed = watcher.run(graph)
    assert pick(executed, "sample") == ["strength=0.5 seed=41 lora=step-9"]
    save_file(original, path)


def test_a_lora_that_does_not_fit_is_named_before_the_first_image(watcher, demo_models):
    folder: Path = demo_models.root / "loras"
    path, tensors = folder / "sweep_wrong.safetensors", load_file(folder / LORA)
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    bad = {f"{stem}.lora_A.weight": tensors[f"{stem}.lora_A.weight"][:, :32].contiguous()}
    bad[f"{stem}.lora_B.weight"] = tensors[f"{stem}.lora_B.weight"]
    save_file(bad, path)
    prompt_id = watcher.queue(sweep_graph("0, 1", seed=51, loras="sweep_wrong"))
    watcher.wait_for(lambda: prompt_id in watcher.list_finished())
    path.unlink()
    assert pick(watcher.list_executed(prompt_id), "sample") == []
    with pytest.raises(PromptError, match="does not fit this MODEL in 1 of 1 modules"):
        watcher.server.wait_for_prompt(prompt_id)


def read_steps(watcher: Watcher, prompt_id: str) -> dict[str, float]:
    """Sampler steps done so far by node, from the newest message about each."""
    steps: dict[str, float] = {}
    for message in list(watcher.messages):
        if message["type"] == "progress_state" and message["data"]["prompt_id"] == prompt_id:
            for name, state in message["data"]["nodes"].items():
                if ".sample " in name:
                    steps[name.split(".sample ")[1]] = state["value"]
    return steps


def test_cancelling_stops_within_a_step_and_finished_cells_stay(watcher, server):
    graph = sweep_graph("0, 0.5, 1", seed=61, size=512, steps=12)
    second = "strength=0.5 seed=61"
    prompt_id = watcher.queue(graph)
    watcher.wait_for(lambda: read_steps(watcher, prompt_id).get(second, 0) >= 2)
    server.post("/interrupt")
    at_interrupt = read_steps(watcher, prompt_id)[second]
    watcher.wait_for(lambda: prompt_id in watcher.list_finished())
    # One step was under way, and its message may have been.
    assert read_steps(watcher, prompt_id)[second] <= at_interrupt + 2 < 12
    assert "strength=1 seed=61" not in read_steps(watcher, prompt_id)
    assert any(m["type"] == "execution_interrupted" for m in watcher.messages)

    entry, executed = watcher.run(graph)
    assert pick(executed, "sample") == [second, "strength=1 seed=61"]
    assert len(read_labels(entry)) == 3


def test_the_report_is_shown_on_the_sweep_itself(watcher):
    entry, _ = watcher.run(sweep_graph("0, 0.9", seed=71))
    shown = [
        (entry["meta"][name]["display_node"], output["qwen_edit_lora_report"][0])
        for name, output in entry["outputs"].items()
        if "qwen_edit_lora_report" in output and name.startswith("sweep")
    ]
    assert {display for display, _ in shown} == {"sweep"}
    last = [m["data"] for m in watcher.messages if m["type"] == "executed"]
    last = [d for d in last if d["display_node"] == "sweep" and d["output"]][-1]
    (report,) = last["output"]["qwen_edit_lora_report"]
    assert report.startswith("2 images: strengths 0, 0.9")
    assert "24 of 24 modules matched, strength 0.9" in report


def test_the_samplers_previews_and_steps_are_sent_to_the_page(watcher):
    prompt_id = watcher.queue(sweep_graph("0, 0.8", seed=81))
    watcher.wait_for(lambda: prompt_id in watcher.list_finished())
    assert read_steps(watcher, prompt_id) == {"strength=0 seed=81": 2, "strength=0.8 seed=81": 2}
    states = [m["data"]["nodes"] for m in watcher.messages if m["type"] == "progress_state"]
    shown = {s["display_node_id"] for nodes in states for n, s in nodes.items() if ".sample " in n}
    assert shown == {"sweep"}
