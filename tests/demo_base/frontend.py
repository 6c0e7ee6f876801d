"""Selectors of parts of ComfyUI's page, each as frontends up to 1.47 and the newer ones have it."""

from __future__ import annotations

TAB_BUTTON = ".qwen_edit_lora-tab-button, [data-testid=qwen_edit_lora-tab-button]"
BADGE = ".sidebar-icon-badge"  # of a tab's button
TOAST = ".p-toast-message, [data-testid=toast]"
