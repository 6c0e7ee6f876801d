"""float32 products at full precision, whatever this process's settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside the block float32 products use full float32; then the user's setting is restored.

    With TF32, which any ComfyUI extension may have enabled, a GPU's have 10 bits.
    """
    # Both of PyTorch's APIs: the older also sets the newer, but not the reverse. From 2.9 on the
    # newer one counts, and reading the older raises an error where the two contradict each other,
    # which requires that it was left at "highest".
    mkldnn: Any = torch.backends.mkldnn  # its type hints lack `matmul`
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    newer = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [backend.fp32_precision for backend in newer]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, value in zip(newer, before, strict=True):
            backend.fp32_precision = value
