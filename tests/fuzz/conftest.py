"""How long the fuzzers run: a fixed slice in every run, everything with QWEN_EDIT_LORA_FUZZ=all.

A test uses the profile's number of examples, or a fraction of it:
`@settings(max_examples=settings.default.max_examples // 4)`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

try:
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis.configuration import set_hypothesis_home_dir
except ImportError:  # not installed by `dev.py setup` of an older checkout
    settings = None
    collect_ignore_glob = ["test_*.py"]

RUNS_ALL = os.environ.get("QWEN_EDIT_LORA_FUZZ") == "all"
SLICE, ALL = 100, 10_000

if settings is not None:
    set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "qwen_edit_lora_fuzz")
    settings.register_profile(
        "qwen_edit_lora",
        max_examples=ALL if RUNS_ALL else SLICE,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    settings.load_profile("qwen_edit_lora")
