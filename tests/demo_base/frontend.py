"""Selectors of parts of ComfyUI's page, each as frontends up to 1.47 and the newer ones have it."""

from __future__ import annotations

import json
from pathlib import Path

TAB_BUTTON = ".qwen_edit_lora-tab-button, [data-testid=qwen_edit_lora-tab-button]"
BADGE = ".sidebar-icon-badge"  # of a tab's button
TOAST = ".p-toast-message, [data-testid=toast]"


def write_user_settings(user: Path) -> None:
    """Settings of a user who knows the page, so that no dialog opens over it by itself.

    Args:
        user: ComfyUI's user directory.
    """
    path = user / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
