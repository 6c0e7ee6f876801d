"""float32 products with all their bits, whatever this process has been set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside the block float32 products are float32's; after it the user's setting stands again.

    With TF32, which any extension of ComfyUI may have switched on, a GPU's have 10 bits.
    """
    # Both of PyTorch's ways to say it: the older sets the newer along, but not back. From 2.9 on
    # the newer one counts, and the older is an error to read where the two contradict each other,
    # which takes that it was left at "highest".
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
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
