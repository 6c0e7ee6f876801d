"""`python -m gpu PART --results FILE ...`: one part of the check, started by gpu_check.py."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from .settings import build_context

#: Part -> module and function; a part that needs two kinds of process starts them itself.
PARTS = {
    "A": ("facts", "run"),
    "B": ("starts", "run"),
    "C": ("pytest_runs", "run_gpu_tests"),
    "D": ("pytest_runs", "run_host_tests"),
    "E": ("dynamic_vram", "run"),
    "F": ("training", "run"),
    "G": ("side_paths", "run"),
}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__)
    parser.add_argument("part", help="a letter, or module.function of this package")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--card", default="unknown")
    parser.add_argument("--command", default="", help="as the user gave it, for the records")
    parser.add_argument("--deadline", type=float, default=time.time() + 10**6)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--folder", type=Path, help="for files; a temporary one if absent")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    letter, _, name = options.part.partition(":")
    module, function = PARTS[letter]
    run = getattr(importlib.import_module(f".{module}", __package__), name or function)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as temporary:
        context = build_context(options, options.folder or Path(temporary), letter)
        try:
            run(context)
        except Exception as e:  # noqa: BLE001  the rest must go on
            context.record.fail("the whole part", e)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
