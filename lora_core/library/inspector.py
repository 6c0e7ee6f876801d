"""Inspections in a separate process, so that the host neither waits for nor crashes with one.

    python -m lora_core.library.inspector

reads {"path": ..., "warnings": [...]} from each line of its input and answers with a line:
{"health": ...} or {"error": sentence}. It ends with its input.

Why not a thread: torch's number of threads is global to the process, and a module's small products,
spread over busy cores, take twenty times as long as on one core (a rank-32
file with 720 modules: 170 s instead of 8). A file that is truncated while mapped ends this process
only, and it has its own priority.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ..disk.json_reader import parse_object
from ..disk.writing import explain
from ..errors import FileError, LoraError
from ..formats.files import read_adapter
from ..inspection.inspection import inspect_adapter
from ..messages import MESSAGES, add_messages, restore_messages
from ..subprocesses import hide_window, run_module
from ..text import flatten
from .health import UNEXPECTED, Health, judge_health

NICENESS = 10
#: One core, and no GPU: not even its context, which takes hundreds of megabytes.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), ""),
    "PYTHONIOENCODING": "utf-8",
}

logger = logging.getLogger(__name__)


class Inspector:
    """Starts the process when there is something to inspect; one file at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False

    def inspect(self, path: Path, warnings: Iterable[str] = ()) -> Health | None:
        """The health of an adapter; None if the inspector was closed meanwhile.

        Raises:
            FileError: the file cannot be inspected, or the process cannot be started.
        """
        question = add_messages({"path": str(path), "warnings": list(warnings)})
        line = self._ask(json.dumps(question))
        if self._is_closed:
            return None
        if not line.endswith("\n"):
            process, self._process = self._process, None
            if process is None:
                return None  # closed just now
            logger.warning(
                "Qwen Edit LoRA: the process that inspected %s ended with status %s",
                path.name,
                process.wait(),
            )
            return Health("unknown", UNEXPECTED, (UNEXPECTED,))
        values = parse_object(line, "the answer")
        if "error" in values:
            raise FileError(restore_messages(values["error"], values.get(MESSAGES)))
        if values["log"]:
            logger.warning("Qwen Edit LoRA: %s: %s", path.name, values["log"])
        parts = values["health"].items()  # JSON has lists only
        given: dict[str, Any] = {n: tuple(p) if isinstance(p, list) else p for n, p in parts}
        health: Health = restore_messages(Health(**given), values.get(MESSAGES))
        return health

    def _ask(self, question: str) -> str:
        """The line it answers with; a partial one if it ended."""
        process = self._start()
        assert process.stdin is not None  # both are pipes
        assert process.stdout is not None
        try:
            process.stdin.write(f"{question}\n")
            process.stdin.flush()
            return process.stdout.readline()
        except (OSError, ValueError):  # it ended before it could read, or `close` was faster
            return ""

    def close(self, for_good: bool = False) -> None:
        """Ends the process, whatever it does; `inspect` starts another one."""
        self._is_closed = for_good
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            priority = 0
            if sys.platform == "win32":
                priority = subprocess.BELOW_NORMAL_PRIORITY_CLASS
            try:
                self._process = subprocess.Popen(
                    run_module("lora_core.library.inspector"),
                    env={**os.environ, **ENVIRONMENT},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    encoding="utf-8",
                    **hide_window(priority),
                )
            except OSError as e:
                raise FileError("no process can be started: {reason}", reason=explain(e)) from None
        return self._process


def main(questions: TextIO, answers: TextIO) -> None:
    with suppress(AttributeError):  # Windows, where it was started so
        os.nice(NICENESS)
    for line in questions:
        print(json.dumps(add_messages(answer(json.loads(line)))), file=answers, flush=True)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        inspection = inspect_adapter(read_adapter(question["path"]))
        warnings = restore_messages(question["warnings"], question.get(MESSAGES))
        return {"health": asdict(judge_health(inspection, warnings)), "log": ""}
    except LoraError as e:
        return {"error": flatten(e.message)}
    except Exception as e:  # noqa: BLE001 - logged by the other process
        return {"health": asdict(Health("unknown", UNEXPECTED, (UNEXPECTED,))), "log": repr(e)}


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # other output must not mix with answers
    main(sys.stdin, answers)
