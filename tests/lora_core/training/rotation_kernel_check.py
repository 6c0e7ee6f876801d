"""Runs or compiles the Triton kernels of norm and rotation, in its own process.

`TRITON_INTERPRET` takes effect when Triton is imported. Prints one line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
TARGETS = (80, 90, 120)


def import_extension() -> None:
    spec = importlib.util.spec_from_file_location(
        "qwen_edit_lora", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def interpret() -> dict[str, float]:
    from qwen_edit_lora.lora_core.training.model import head_rotation, rotation_kernel

    def measure(dtype: torch.dtype, result_dtype: torch.dtype) -> float:
        """Largest relative error; 25 rows and 40 rows, so that the last programs are not full."""
        torch.manual_seed(0)
        shape, num_joint = (2, 4, 5, 32), 9
        x, grad = torch.randn(shape).to(dtype), torch.randn(2, num_joint, 5, 32).to(dtype)
        weight, angles = torch.randn(32).to(dtype), torch.randn(num_joint, 16)
        cos = angles.cos().repeat_interleave(2, dim=1).to(dtype)
        sin = torch.stack([-angles.sin(), angles.sin()], dim=-1).flatten(1).to(dtype)
        errors = []
        for first in (0, 5):
            joint = torch.zeros(grad.shape, dtype=result_dtype)
            options = weight, cos, sin, first, 1e-6
            rotation_kernel.write_rotated(x, *options, joint)
            found = [joint, rotation_kernel.compute_gradient(grad.to(result_dtype), x, *options)]
            wide = [t.double() for t in (weight, cos, sin)]
            exact = torch.zeros(grad.shape, dtype=torch.float64)
            head_rotation.write_rotated(x.double(), *wide, first, 1e-6, exact)
            exact_grad = head_rotation.compute_gradient(
                grad.double(), x.double(), *wide, first, 1e-6
            )
            if result_dtype != dtype:  # the gradient is in the dtype of x
                found, exact_grad = found[:1], None
            pairs = zip(found, (exact, exact_grad), strict=False)
            errors += [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
            assert (joint.count_nonzero(dim=(0, 2, 3)) > 0).tolist() == [
                first <= place < first + 4 for place in range(num_joint)
            ]
        return max(errors)

    return {
        "float32": measure(torch.float32, torch.float32),
        "bfloat16, wide": measure(torch.bfloat16, torch.float32),
        "compared": head_rotation.compare_kernels(rotation_kernel, torch.device("cpu")),
    }


def compile_kernels() -> dict[str, list[str]]:
    """The instructions that read and write memory, by kernel, target and dtype."""
    import triton
    from qwen_edit_lora.lora_core.training.model import rotation_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for target in TARGETS:
        for kind in ("bf16", "fp32"):
            for kernel in (rotation_kernel._forward, rotation_kernel._backward):
                pointers = [n for n in kernel.arg_names if n.endswith("_pointer")]
                signature = {
                    name: f"*{kind}" if name in pointers else "fp32" if name == "eps" else "i32"
                    for name in kernel.arg_names
                }
                constants = {"WIDTH": 128, "ROWS": rotation_kernel.ROWS}
                signature |= dict.fromkeys(constants, "constexpr")
                aligned = {
                    (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers
                }
                source = ASTSource(kernel, signature, constants, aligned)
                made = triton.compile(source, target=GPUTarget("cuda", target, 32))
                name = f"{kernel.__name__} {kind} sm_{target}"
                found[name] = sorted(set(re.findall(r"(?:ld|st)\.global\S*", made.asm["ptx"])))
    return found


if __name__ == "__main__":
    import_extension()
    result = interpret() if sys.argv[1] == "interpret" else compile_kernels()
    sys.stdout.write(json.dumps(result) + "\n")
