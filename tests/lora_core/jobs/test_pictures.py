"""A job's images: their names, which may be read, and that making them changes no weight."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from demo_base.checkout import ROOT
from PIL import Image
from qwen_edit_lora.lora_core import ConfigError, FileError
from qwen_edit_lora.lora_core.jobs import picture_writer
from qwen_edit_lora.lora_core.jobs.job import SampleSettings, UnknownImageError
from qwen_edit_lora.lora_core.jobs.picture_writer import IN_TILES, ON_CPU, ImageWriter
from qwen_edit_lora.lora_core.jobs.pictures import (
    SIGNATURE,
    name_sample,
    name_source,
    name_target,
    parse_name,
)
from qwen_edit_lora.lora_core.pairs.vae_copy import find_vae, get_path, keep_vae
from qwen_edit_lora.lora_core.training.data.dataset import DatasetWriter
from qwen_edit_lora.lora_core.training.sampling.image_decoder import load_decoder
from safetensors.torch import load_file, save_file
from tiny import make_item
from tiny_jobs import assert_equal_weights, make_train, train_here

VAE = ROOT / "tests" / "demo_base" / "weights" / "vae.safetensors"
CPU = torch.device("cpu")
IDENTITY = "0123456789abcdef"


@pytest.mark.parametrize(
    "item", ["a", "a_1", "source_a_0", "step_00000001_a", "target_x", "A-9.b_.png", "0", "x" * 200]
)
def test_names_tell_kind_item_step_and_index_whatever_an_item_is_called(item):
    assert parse_name(f"{name_source(item, 2)}.png").index == 2
    assert parse_name(f"{name_sample(item, 1500)}.png").step == 1500
    names = (name_source(item, 0), name_target(item), name_sample(item, 0))
    for name, kind in zip(names, ("source", "target", "sample"), strict=True):
        picture = parse_name(f"{name}.png")
        assert (picture.name, picture.kind, picture.item) == (f"{name}.png", kind, item)


@pytest.mark.parametrize(
    "name",
    [
        *("", "a.png", "step_1_a.png", "step_00000001_.png", "step_00000001_a.safetensors"),
        *("target_a.png\n", "target_../a.png", "target_a/b.png", "target_.a.png", "source_a.png"),
        *("source_a_0.png.tmp", ".target_a.png", "target_ä.png", "step_٠٠٠٠٠٠٠١_a.png"),
    ],
)
def test_other_file_names_are_not_image_names(name):
    assert parse_name(name) is None


def test_images_are_listed_in_order_and_read_by_listed_names_only(store, material, tmp_path):
    job_id = store.submit(make_train(material))
    assert store.list_images(job_id) == []
    folder = store.catalog.find(job_id).samples
    folder.mkdir()
    names = (
        *("step_00000010_b.png", "step_00000002_b.png", "target_b.png", "source_b_1.png"),
        *("source_b_0.png", "target_a.png", "step_00000002_b.safetensors", "notes.txt"),
    )
    for name in names:
        (folder / name).write_bytes(SIGNATURE + name.encode())
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "target_c.png").symlink_to(tmp_path / "secret")
    listed = store.list_images(job_id)
    assert [picture.name for picture in listed] == [
        *("target_a.png", "source_b_0.png", "source_b_1.png", "target_b.png"),
        *("step_00000002_b.png", "step_00000010_b.png"),
    ]
    assert [(p.kind, p.step, p.index) for p in listed[1::2]] == [
        *(("source", None, 0), ("target", None, None), ("sample", 10, None)),
    ]
    assert store.read_image(job_id, "source_b_1.png") == SIGNATURE + b"source_b_1.png"
    for name in ("target_c.png", "notes.txt", "../state.json", "source_b_9.png", "/etc/passwd"):
        with pytest.raises(UnknownImageError, match="there is no image"):
            store.read_image(job_id, name)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return keep_vae(tmp_path / "cache", IDENTITY, load_file(VAE).items())


def test_the_kept_part_of_a_vae_decodes_bit_identically_without_random_numbers(kept):
    before = torch.get_rng_state()
    ours, whole = load_decoder(kept), load_decoder(VAE)
    assert torch.equal(torch.get_rng_state(), before)
    assert kept.stat().st_size < VAE.stat().st_size
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(latents), whole(latents))
    assert whole(latents).std() > 0.01


def test_a_vae_is_stored_once_and_found_by_the_sets_made_with_it(kept, tmp_path):
    stamp = kept.stat().st_mtime_ns
    assert keep_vae(tmp_path / "cache", IDENTITY, {}.items()) == kept  # not even looked at
    assert kept.stat().st_mtime_ns == stamp
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    for name, metadata, expected in (
        ("with", {"vae": IDENTITY}, kept),
        ("without", {}, None),
        ("another", {"vae": "f" * 24}, None),
        ("evil", {"vae": "../../secret"}, None),
    ):
        writer = DatasetWriter(tmp_path / "cache" / "sets" / name)
        writer.add("a", make_item(0))
        assert find_vae(writer.finish(metadata)) == expected, name
    assert find_vae(tmp_path / "nothing") is None
    kept.write_bytes(b"cut off")
    assert find_vae(tmp_path / "cache" / "sets" / "with") is None


def test_a_vae_is_not_written_through_a_linked_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "vaes").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(FileError, match="vaes in cache is a link"):
        keep_vae(tmp_path / "cache", IDENTITY, load_file(VAE).items())
    assert list((tmp_path / "outside").iterdir()) == []


def test_weights_that_share_the_memory_of_their_file_are_kept_too(tmp_path):
    tensors = load_file(VAE)
    memory = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    parts = memory.split([tensor.numel() for tensor in tensors.values()])
    views = {key: part.view(tensors[key].shape) for key, part in zip(tensors, parts, strict=True)}
    kept = load_file(keep_vae(tmp_path, IDENTITY, views.items()))
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in kept.items())
    assert {key.partition(".")[0] for key in kept} == {"decoder", "conv2"}


def test_a_vae_of_another_kind_or_a_full_disk_is_a_clear_error(tmp_path):
    tensors = load_file(VAE)
    others = {
        "is not a VAE": {k: v for k, v in tensors.items() if k != "conv2.weight"},
        "not a VAE of Qwen-Image": {**tensors, "decoder.conv1.weight": torch.zeros(8, 48, 3, 3, 3)},
        "plain numbers": {**tensors, "conv2.weight": tensors["conv2.weight"].to("meta")},
    }
    for sentence, weights in others.items():
        with pytest.raises(ConfigError, match=sentence):
            keep_vae(tmp_path, IDENTITY, weights.items())
    assert not get_path(tmp_path, IDENTITY).exists()
    (tmp_path / "vaes").write_text("in the way")
    with pytest.raises(FileError, match="its copy cannot be written"):
        keep_vae(tmp_path, IDENTITY, tensors.items())


def samples(**settings) -> SampleSettings:
    return SampleSettings(every=3, steps=2, **settings)


def test_making_images_leaves_a_jobs_weights_bit_identical(store, material, kept):
    items = ["item_0", "item_2"]
    without = train_here(store, make_train(material))
    with_pictures = train_here(store, make_train(material), samples(items=items, vae=str(kept)))
    pictures = store.list_images(with_pictures)
    assert [(p.kind, p.item, p.step, p.index) for p in pictures] == [
        line
        for item in items
        for line in (
            ("source", item, None, 0),
            ("target", item, None, None),
            *(("sample", item, step, None) for step in (0, 3, 6)),
        )
    ]
    assert store.list_images(without) == []
    ours, theirs = (store.catalog.find(job).path for job in (with_pictures, without))
    for name in ("tiny.safetensors", "tiny_ema.safetensors"):
        assert_equal_weights(ours / name, theirs / name)
    metrics = [store.read_metrics(job) for job in (with_pictures, without)]
    assert [line["loss"] for line in metrics[0]] == [line["loss"] for line in metrics[1]]
    assert store.get(with_pictures).state.notes == ()

    target = load_file(material / "data" / "items" / "item_2.safetensors")["target"]
    decoder = load_decoder(VAE, dtype=torch.float32)
    with torch.no_grad():
        decoded = decoder.vae.decode(target[None, :, None], return_dict=False)[0][0, :, 0]
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().movedim(0, -1)
    data = store.read_image(with_pictures, "target_item_2.png")
    with Image.open(io.BytesIO(data)) as image:
        shown = torch.tensor(list(image.getdata()), dtype=torch.uint8).view(64, 64, 3)
    assert (shown.int() - expected.int()).abs().max() <= 1


def test_a_missing_vae_costs_the_images_but_not_the_training(store, material, kept):
    save_file({"a": torch.zeros(1)}, kept)
    job_id = train_here(store, make_train(material), samples(vae=str(kept)))
    assert store.list_images(job_id) == []
    assert len(store.list_samples(job_id)) == 3  # latents
    (note,) = store.get(job_id).state.notes
    assert "no images are made, latents only" in note
    assert "is not a VAE of Qwen-Image" in note


def test_images_too_large_for_the_memory_are_left_out_with_a_note(kept, tmp_path):
    notes: list[str] = []
    writer = ImageWriter(str(kept), None, CPU, notes.append)
    huge = torch.zeros(1, 16, 1, 1).expand(1, 16, 1 << 21, 1 << 21)  # a mere view
    with writer.ready():
        writer.write(torch.zeros(1, 16, 2, 2), tmp_path / "small")
        writer.write(huge, tmp_path / "huge")
        assert not writer.is_able
        writer.write(torch.zeros(1, 16, 2, 2), tmp_path / "after")
    assert notes == ["images do not fit into memory; latents only are kept"]
    assert [path.name for path in tmp_path.glob("*.png")] == ["small.png"]


@pytest.mark.parametrize(
    ("fails", "ways"),
    [
        ({"whole on gpu"}, ["whole on gpu", "tiles on gpu"]),
        ({"whole on gpu", "tiles on gpu"}, ["whole on gpu", "tiles on gpu", "whole on cpu"]),
    ],
)
def test_an_image_too_large_for_the_gpu_is_decoded_in_tiles_and_then_on_the_cpu(
    fails, ways, tmp_path, monkeypatch
):
    tried, notes = [], []

    class Decoder:
        vae = torch.nn.Module()

        def __call__(self, latents, in_tiles=False):
            way = f"{'tiles' if in_tiles else 'whole'} on {'gpu' if latents.is_meta else 'cpu'}"
            tried.append(way)
            if way in fails:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.zeros(1, 3, 16, 16)

    monkeypatch.setattr(picture_writer, "load_decoder", lambda *arguments: Decoder())
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    # Whatever is no CPU stands for a device whose memory may be too small.
    writer = ImageWriter("a path", None, torch.device("meta"), notes.append)
    for name in ("first", "second"):
        with writer.ready():
            writer.write(torch.zeros(1, 16, 2, 2), tmp_path / name)
    assert tried == [*ways, ways[-1]]  # the next one starts where the first one ended up
    assert notes == [IN_TILES, ON_CPU][: len(ways) - 1]
    assert len(list(tmp_path.glob("*.png"))) == 2
