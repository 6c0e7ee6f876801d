"""Other libraries: names from diffusers, or a clear error; and keeping all of them quiet."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

from ...errors import ConfigError

INSTALL = 'pip install --upgrade "diffusers>=0.35"'

#: They note on import which of their own optional parts are missing; nothing a user can use.
NOISY_LOGGERS = ("bitsandbytes", "diffusers", "torch.utils._pytree", "torchao", "transformers")

#: What diffusers imports wherever it finds it, and training does without, or imports itself: two
#: fifths of a start's processor time, and an error where diffusers does not know the version.
HIDDEN = ("bitsandbytes", "peft", "scipy", "torchao", "torchvision", "transformers")
#: What is imported from it: object and module.
IMPORTED = (
    ("QwenImageTransformer2DModel", "diffusers"),
    ("AutoencoderKLQwenImage", "diffusers"),
    ("convert_wan_vae_to_diffusers", "diffusers.loaders.single_file_utils"),
)


def import_diffusers_alone() -> None:
    """Imports what is needed of diffusers as if the `HIDDEN` packages were not installed.

    It then does without them for the rest of the process, so only in a process of our own. What
    fails is left to `import_from_diffusers`.
    """
    hidden = [name for name in HIDDEN if name not in sys.modules]
    modules: dict[str, Any] = sys.modules  # None stands for a module that cannot be found
    modules.update(dict.fromkeys(hidden))
    try:
        with suppress(ImportError, AttributeError, RuntimeError):
            for name, module in IMPORTED:
                getattr(importlib.import_module(module), name)
    finally:
        for name in hidden:
            del modules[name]


def import_from_diffusers(*names: str, module: str = "diffusers") -> tuple[Any, ...]:
    """Objects of a module of diffusers.

    Raises:
        ConfigError: diffusers is not installed, or cannot be imported: it raises RuntimeError where
            another package that it looks for is there in a version it does not know.
    """
    try:
        loaded = importlib.import_module(module)
        return tuple(getattr(loaded, name) for name in names)
    except ModuleNotFoundError as e:
        if e.name != "diffusers":
            raise_broken(e)
        raise ConfigError(
            "training needs diffusers 0.35 or newer, which is not installed; run {install}",
            install=INSTALL,
        ) from None
    except (ImportError, AttributeError, RuntimeError) as e:
        raise_broken(e)


def raise_broken(error: Exception) -> NoReturn:
    reason = " ".join(str(error).split()).rstrip(".")
    raise ConfigError(
        "training needs diffusers 0.35 or newer, and the installed one cannot be used "
        "({reason}); run {install}",
        reason=reason,
        install=INSTALL,
    ) from None


def quiet_libraries() -> None:
    """Lets libraries log errors only, so that a terminal shows the run."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
