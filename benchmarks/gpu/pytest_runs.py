"""Parts C and D: tests of the suite that are more informative on a GPU, counted individually."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from .settings import ROOT, Context

MARK = "pytest.mark.gpu"
HOST_TESTS = tuple(
    f"tests/nodes/{name}.py"
    for name in (
        *("patching/test_side_path", "patching/test_merge", "patching/test_merged_storages"),
        *("patching/test_low_precision", "sweeping/test_sweep_bits"),
    )
)
#: One test in a dry run, which shows that the host starts.
DRY_HOST_TESTS = (f"{HOST_TESTS[0]}::test_strength_0_is_bit_identical_to_the_base",)
MAX_FAILURES = 12  # listed individually


def run_gpu_tests(context: Context) -> None:
    """The tests marked `gpu`; without a GPU they are skipped, as a dry run expects."""
    files = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK in path.read_text(encoding="utf-8")
    )
    run_pytest(context, [*files, "-m", "gpu"], {})


def run_host_tests(context: Context) -> None:
    """Tests of side path and merge, with ComfyUI on the GPU."""
    if context.is_dry:
        run_pytest(context, list(DRY_HOST_TESTS), {})
        return
    files = [name for name in HOST_TESTS if (ROOT / name).is_file()]
    run_pytest(context, files, {"QWEN_EDIT_LORA_GPU": "1"})


def run_pytest(context: Context, arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Records how many tests passed; none may fail.

    A bare machine has other versions than the pinned ones, so warnings are not errors here.
    """
    report, cache = context.folder / "report.xml", context.folder / "cache"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "--tb=short"]
    command += ["-o", f"cache_dir={cache}", f"--junitxml={report}", *arguments]
    merged = {**os.environ, "OMP_NUM_THREADS": "4", **environment}
    ended = subprocess.run(
        command, cwd=ROOT, env=merged, stdout=sys.stderr, stderr=sys.stderr, check=False
    )
    counts, failures = read_report(report)
    for name, count in counts.items():
        context.record.figure(f"tests {name}", count)
    for name, message in failures[:MAX_FAILURES]:
        context.record.must(name, False, "failed", message)
    num_taken = counts.get("run", 0) - (0 if context.is_dry else counts.get("skipped", 0))
    is_good = ended.returncode == 0 and num_taken > 0
    context.record.must("pytest ends well", is_good, ended.returncode)


def read_report(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Numbers of tests run and skipped, and the failures with their messages, from a junit file."""
    if not path.is_file():
        return {}, []
    suite = ElementTree.parse(path).getroot()
    cases = list(suite.iter("testcase"))
    failures = []
    for case in cases:
        for outcome in (*case.findall("failure"), *case.findall("error")):
            failures.append((case.get("name", ""), outcome.get("message", "")[:300]))
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"run": len(cases), "skipped": skipped, "failed": len(failures)}
    return counts, failures
