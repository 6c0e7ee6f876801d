"""GGUF bases in Train's list: from every allowed folder, and nothing from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen_edit_lora.lora_core import FileError
from qwen_edit_lora.lora_core.base_model.base_files import open_base_file
from safetensors.torch import load_file

pytestmark = pytest.mark.comfy


def write_gguf(path: Path, base: Path) -> Path:
    """The demo base as written by the converters for ComfyUI-GGUF."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "qwen_image")
    for key, tensor in load_file(base).items():
        if tensor.numel():
            writer.add_tensor(key, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files_are_offered_found_and_opened(
    comfyui: Any, ours: Any, demo_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from qwen_edit_lora.nodes.train import QwenEditLoraTrain

    folders = comfyui.folder_paths.folder_names_and_paths
    assert ours.host.map_gguf_files() == {}
    # as ComfyUI-GGUF does it
    extra = tmp_path / "unet_gguf"
    monkeypatch.setitem(folders, "unet_gguf", ([str(extra)], {".gguf"}))
    inside = write_gguf(
        demo_models.root / "unet" / "q" / "edit-Q8_0.gguf", demo_models.dit["2509_fp32"]
    )
    try:
        beside = write_gguf(extra / "other.GGUF", demo_models.dit["2509_fp32"])
        (tmp_path / "secret.gguf").write_bytes(inside.read_bytes())
        name = str(Path("q") / inside.name)
        names = [name, "other.GGUF"]
        assert sorted(ours.host.map_gguf_files()) == sorted(names)
        assert [n for n in ours.host.list_training_bases() if n.lower().endswith("gguf")] == names[
            ::-1
        ]
        offered = QwenEditLoraTrain.define_schema().inputs[0].options
        assert set(names) < set(offered)
        assert "tiny_fp32_2509.safetensors" in offered
        for given, path in zip(names, (inside, beside), strict=True):
            assert ours.host.find_training_base(given).samefile(path)
        base = open_base_file(ours.host.find_training_base(name))
        assert len(base.shapes) > 20
        base.release()
        for bad in (
            "../secret.gguf",
            str(tmp_path / "secret.gguf"),
            "q/../q/edit-Q8_0.gguf",
            ".gguf",
        ):
            with pytest.raises(FileError, match="is not in the diffusion_models folders"):
                ours.host.find_training_base(bad)
        for bad in ("../x.safetensors", ""):
            with pytest.raises(FileError, match="is not in the diffusion_models folders"):
                ours.host.find_training_base(bad)
        # The nodes that cannot read them do not offer them.
        assert not any(n.lower().endswith("gguf") for n in ours.host.list_diffusion_models())
    finally:
        inside.unlink()
