"""ComfyUI's folders: what is in them, and where output goes."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...lora_core import FileError
from ...lora_core.disk.safetensors_file import is_safetensors
from ...lora_core.errors import get_reason
from ...lora_core.text import shorten


def list_loras() -> list[str]:
    return [name for name in folder_paths.get_filename_list("loras") if is_safetensors(name)]


def find_lora(lora_name: str | None) -> Path:
    """Full path of a file in one of the loras folders.

    Raises:
        FileError: no such file, or a name that points outside these folders.
    """
    name = lora_name if isinstance(lora_name, str) else ""
    parts = Path(name.replace("\\", "/")).parts
    if not name or ".." in parts or Path(name).is_absolute() or ":" in name or "\0" in name:
        shown = shorten(name if isinstance(lora_name, str | None) else repr(lora_name))
        raise FileError(
            "{shown!r} is not a name inside the loras folders; expected a file such as "
            "'my_lora.safetensors', chosen from the list.",
            shown=shown,
        )
    try:
        path = folder_paths.get_full_path("loras", name)
        if path is None and "\\" in name:  # a graph made on Windows
            path = folder_paths.get_full_path("loras", name.replace("\\", "/"))
    except OSError as e:
        raise FileError(
            "{name} cannot be opened: {reason}.", name=shorten(name), reason=get_reason(e)
        ) from None
    except ValueError:  # half a surrogate pair
        path = None
    if path is None:
        raise FileError(
            "{name} is not in the loras folders; expected one of the {num_loras} files "
            "there. Put it into models/loras, press R, and choose it.",
            name=shorten(name),
            num_loras=len(list_loras()),
        )
    return Path(path)


def find_lora_files() -> dict[str, Path]:
    """Name in the loaders' list -> path, of every file in the loras folders, pickles included."""
    names = folder_paths.get_filename_list("loras")
    paths = {name: folder_paths.get_full_path("loras", name) for name in names}
    return {name: Path(path) for name, path in paths.items() if path is not None}


def list_diffusion_models() -> list[str]:
    names = folder_paths.get_filename_list("diffusion_models")
    return [name for name in names if is_safetensors(name)]


def find_diffusion_model(model_name: str) -> Path:
    """Full path of a file below one of the diffusion_models folders.

    Raises:
        FileError: no such file.
    """
    # Only names from the list: those cannot point outside.
    known = isinstance(model_name, str) and model_name in list_diffusion_models()
    path = folder_paths.get_full_path("diffusion_models", model_name) if known else None
    if path is None:
        raise FileError(
            "{model_name!r} is not in the diffusion_models folders; expected a .safetensors "
            "file there. Put it into models/diffusion_models, press R, and choose it.",
            model_name=shorten(str(model_name)),
        )
    return Path(path)


def list_training_bases() -> list[str]:
    """What can be trained on: the diffusion models' files, and GGUF files beside them."""
    return [*list_diffusion_models(), *sorted(map_gguf_files())]


def find_training_base(model_name: str) -> Path:
    """Full path of one of `list_training_bases`.

    Raises:
        FileError: no such file.
    """
    if isinstance(model_name, str) and model_name.lower().endswith(".gguf"):
        path = map_gguf_files().get(model_name)
        if path is None:
            raise FileError(
                "{model_name!r} is not in the diffusion_models folders; put it into "
                "models/diffusion_models or models/unet, press R, and choose it.",
                model_name=shorten(model_name),
            )
        return path
    return find_diffusion_model(model_name)


def map_gguf_files() -> dict[str, Path]:
    """Name -> path of the GGUF files in the folders of diffusion models.

    ComfyUI itself lists none; the extension ComfyUI-GGUF registers its own list of folders.
    """
    kinds = ("diffusion_models", "unet_gguf")
    known = [kind for kind in kinds if kind in folder_paths.folder_names_and_paths]
    folders = dict.fromkeys(path for kind in known for path in folder_paths.get_folder_paths(kind))
    found: dict[str, Path] = {}
    for folder in folders:
        names, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
        for name in folder_paths.filter_files_extensions(names, [".gguf"]):
            found.setdefault(name, Path(folder, name))
    return found


def find_vaes(name: str) -> list[Path]:
    """VAEs with this file name, in any subfolder of the vae folders."""
    names = folder_paths.get_filename_list("vae")
    same = [n for n in names if Path(n.replace("\\", "/")).name == name]
    return [Path(folder_paths.get_full_path_or_raise("vae", n)) for n in same]


def choose_output_path(filename_prefix: str) -> Path:
    """A path without suffix, below ComfyUI's output folder, that no file has yet.

    Raises:
        FileError: no such name can be, or it points outside.
    """
    output = folder_paths.get_output_directory()
    try:
        if not isinstance(filename_prefix, str) or "\0" in filename_prefix:
            raise ValueError
        filename_prefix.encode()
        folder = Path(output, os.path.dirname(os.path.normpath(filename_prefix)))  # noqa: PTH120
        is_inside = folder_paths.is_within_directory(output, str(folder))
    except ValueError:  # a null character, or half a surrogate pair
        raise FileError(
            "{filename_prefix!r} is not a file name; expected one such as 'loras/my_lora'.",
            filename_prefix=shorten(str(filename_prefix)),
        ) from None
    if not is_inside:
        raise FileError(
            "{filename_prefix!r} points outside the output folder; expected a name such as "
            "'loras/my_lora'.",
            filename_prefix=shorten(filename_prefix),
        )
    try:
        found = folder_paths.get_save_image_path(filename_prefix, output)
    except OSError as e:
        raise FileError(
            "{filename_prefix} cannot be written: {reason}.",
            filename_prefix=shorten(filename_prefix),
            reason=get_reason(e),
        ) from None
    folder, filename, counter, *_ = found
    return Path(folder, f"{filename}_{counter:05}_")


def name_below_output(path: Path) -> str:
    return path.relative_to(folder_paths.get_output_directory()).as_posix()


def list_dataset_roots() -> dict[str, list[str]]:
    """Name -> folders that training images may be in."""
    return {
        "datasets": folder_paths.get_folder_paths("datasets"),
        "input": [folder_paths.get_input_directory()],
        "output": [folder_paths.get_output_directory()],
    }


def is_within_directory(directory: str, path: Path) -> bool:
    """Whether a path, links followed, is inside."""
    return folder_paths.is_within_directory(directory, str(path))


def get_cache_folder() -> Path:
    """Where results may be kept over restarts; no HTTP route serves it. May not exist yet."""
    return Path(folder_paths.get_system_user_directory("qwen_edit_lora"))


def get_jobs_folder() -> Path:
    """Where training jobs live over restarts; no HTTP route serves it. May not exist yet."""
    return get_cache_folder() / "training"


def get_loras_folder() -> Path:
    """Where a new LoRA goes: the first of the folders that every loader lists."""
    return Path(folder_paths.get_folder_paths("loras")[0])
