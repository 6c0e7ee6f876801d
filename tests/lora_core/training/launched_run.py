"""One process of test_processes.py: `python launched_run.py FOLDER BATCH_SIZE [--resume]`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def import_by_path(name: str, path: Path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


import_by_path("qwen_edit_lora", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
tiny = import_by_path("tiny", HERE / "tiny.py")

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from qwen_edit_lora.lora_core.training.dataset import read_dataset  # noqa: E402
from qwen_edit_lora.lora_core.training.trainer import train  # noqa: E402


def main(folder: Path, batch_size: int, resume: bool) -> None:
    torch.set_num_threads(1)
    config = tiny.make_config(
        folder,
        **{
            "steps": 6,
            "data.batch_size": batch_size,
            "optimizer.accumulation": 2,
            "optimizer.ema_decay": 0.9,
            "saving.checkpoint_every": 3,
        },
    )
    model, injection = tiny.make_injected(config)
    accelerator = Accelerator(cpu=True)
    reports = train(
        *(config, model, injection, read_dataset(folder.parent / "data")),
        **{"accelerator": accelerator, "resume": resume},
    )
    for _ in reports:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "--resume" in sys.argv)
