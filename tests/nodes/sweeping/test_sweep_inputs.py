"""What a sweep in a running ComfyUI refuses, and the strengths it chooses itself."""

from __future__ import annotations

import json
import urllib.error

import pytest
from demo_base.prompts import node
from demo_base.server import PromptError

from .conftest import CUSTOM, LINKS, own_sampler_graph, read_labels, sweep_graph

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("loras")]


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
