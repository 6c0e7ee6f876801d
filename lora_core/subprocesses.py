"""Starting other Python processes that run a module of this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

#: The folder that holds `lora_core`.
PACKAGE_ROOT = Path(__file__).resolve().parents[1]
#: What `python -m MODULE` does, also for a Python that looks for modules neither in the working
#: directory nor in PYTHONPATH, as the one of ComfyUI's portable build for Windows. Before anything
#: is imported the working directory is left out: its files are no modules. (Python 3.10 has no -P.)
BOOT = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; "
    "module = sys.argv.pop(1); sys.path.insert(0, sys.argv.pop(1)); "
    "import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def run_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package, or a library's, in this Python."""
    isolation = ["-s"] if sys.flags.no_user_site else []  # from the user's packages, as here
    return [sys.executable, *isolation, "-c", BOOT, module, str(PACKAGE_ROOT), *arguments]


def hide_window(flags: int = 0) -> dict[str, Any]:
    """For `Popen`: keeps a program without a console from opening one."""
    if sys.platform != "win32":
        return {}
    return {"creationflags": flags | subprocess.CREATE_NO_WINDOW}
