"""Extract computes float32 products at full precision, and restores the process's setting."""

from __future__ import annotations

import pytest
import torch
from dense_algebra import COLUMNS, ROWS, TO_Q
from qwen_edit_lora.lora_core import NonFiniteWeightsError, extract_adapter
from qwen_edit_lora.lora_core.algebra.matmul_precision import exact_products
from qwen_edit_lora.lora_core.toolbox import extraction

CUBLAS, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
HAS_NEWER = hasattr(CUBLAS, "fp32_precision")


def read_setting():
    """Reads all settings; PyTorch raises if its two APIs contradict each other."""
    found = [getattr(one, "fp32_precision", None) for one in (CUBLAS, MKLDNN)]
    for read in (torch.get_float32_matmul_precision, lambda: CUBLAS.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("contradicts")
    return found


@pytest.fixture(autouse=True)
def setting():
    """Restores the setting after a test."""
    with exact_products():
        yield


def use_older_name():
    torch.set_float32_matmul_precision("medium")


def use_flag():
    CUBLAS.allow_tf32 = True


def use_newer_name():
    CUBLAS.fp32_precision = "tf32"


def use_newer_name_for_all():
    CUBLAS.fp32_precision = MKLDNN.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"


NEWER = pytest.mark.skipif(not HAS_NEWER, reason="this PyTorch has no fp32_precision")
WAYS = [
    use_older_name,
    use_flag,
    pytest.param(use_newer_name, marks=NEWER),
    pytest.param(use_newer_name_for_all, marks=NEWER),
]


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("fails", [False, True])
def test_extract_computes_in_float32_and_leaves_the_users_setting(change, fails, monkeypatch):
    inside = []
    truncate = extraction.truncate_dense

    def watch(*arguments):
        inside.append(read_setting())
        if fails:
            raise NonFiniteWeightsError("as if")
        return truncate(*arguments)

    monkeypatch.setattr(extraction, "truncate_dense", watch)
    base = {f"{TO_Q}.weight": torch.randn(ROWS, COLUMNS)}
    tuned = {f"{TO_Q}.weight": base[f"{TO_Q}.weight"] + 1e-2}
    before_all = getattr(torch.backends, "fp32_precision", None)
    try:
        change()
        before = read_setting()
        if fails:
            with pytest.raises(NonFiniteWeightsError):
                extract_adapter(base, tuned, rank=2)
        else:
            extract_adapter(base, tuned, rank=2)
        assert read_setting() == before
    finally:
        if before_all is not None:
            torch.backends.fp32_precision = before_all
    precision = "ieee" if HAS_NEWER else None
    assert inside == [[precision, precision, "highest", False]]
    assert before != inside[0]
