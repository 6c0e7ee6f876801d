"""A run's memory and time before it starts, measured in a separate process.

In the server's process it would import diffusers, hold memory of the GPU's allocator and crash the
server with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from ..errors import ConfigError
from ..messages import MESSAGES, get_message, message, restore_messages
from ..progress import ShouldStop
from ..subprocesses import hide_window, run_module
from ..training.config.config import TrainConfig
from ..training.config.config_files import config_to_dict
from ..training.estimate.estimate import Estimate
from ..training.machine.memory import names_out_of_memory
from .devices import Device, set_device
from .launch import SHARED, build_environment

POLL_INTERVAL = 0.1  # seconds
PREFIX = "estimate: "


def estimate_in_process(
    config: TrainConfig,
    device: Device,
    should_stop: ShouldStop | None = None,
    with_samples: bool = False,
) -> Estimate:
    """`training.estimate.estimate_run`, elsewhere.

    Args:
        device: the one that the job would get; the process sees no other.
        should_stop: asked ten times a second; True ends the measuring.
        with_samples: whether the job makes sample images.

    Raises:
        ConfigError: what the measurement finds wrong with the run, in its own words.
        InterruptedError: `should_stop` returned True.
    """
    with tempfile.TemporaryDirectory(prefix="qwen_edit_lora_") as folder:
        path = Path(folder) / "config.json"
        placed = set_device(config, device.name)
        path.write_text(json.dumps(config_to_dict(placed)), encoding="utf-8")
        flags = {SHARED: device.is_shared, "--samples": with_samples}
        options = ["--json", *(flag for flag, is_set in flags.items() if is_set)]
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        with out.open("wb") as stdout, errors.open("wb") as stderr:
            process = subprocess.Popen(
                run_module("lora_core", "estimate", str(path), *options),
                cwd=folder,
                env=build_environment([device], os.environ),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                **hide_window(),
            )
            try:
                while process.poll() is None:
                    if should_stop is not None and should_stop():
                        raise InterruptedError("the estimate was stopped; nothing was started")
                    time.sleep(POLL_INTERVAL)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if process.returncode:
            said = read_error(out.read_text("utf-8", "replace"))
            told = errors.read_text("utf-8", "replace")
            raise ConfigError(said or explain(told, process.returncode))
        values = json.loads(out.read_text(encoding="utf-8"))
    del values["fits"]
    return Estimate(**{**values, "advice": tuple(map(message, values["advice"]))})


def read_error(out: str) -> str:
    """The error that the command reports as JSON; "" if it ended in another way."""
    try:
        values = json.loads(out)
        return get_message(restore_messages(values["error"], values.get(MESSAGES)))
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


def explain(errors: str, exit_code: int) -> str:
    """The command's own error message, or the last line it printed."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    own = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    if own:
        return own[-1]
    if names_out_of_memory(errors):
        return message(
            "not even three blocks fit into the device's free memory; close other programs "
            "that use it, or choose a smaller storage or dataset"
        )
    last = lines[-1] if lines else message("it reported nothing")
    return message(
        "the estimate ended with exit code {exit_code}: {last}",
        exit_code=exit_code,
        last=last[:300],
    )
