"""The GPU check, on a CPU: every part runs, and reports its results correctly."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    """The package `benchmarks/gpu`, under its own name."""
    spec = importlib.util.spec_from_file_location(
        "gpu",
        BENCHMARKS / "gpu" / "__init__.py",
        submodule_search_locations=[str(BENCHMARKS / "gpu")],
    )
    sys.modules["gpu"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("records", "children", "bundle", "settings", "traces", "pytest_runs"):
        importlib.import_module(f"gpu.{name}")
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "gpu"]:
        del sys.modules[name]


@pytest.fixture
def make_recorder(gpu, tmp_path):
    def make(is_dry=False, deadline=float("inf"), part="A"):
        path = tmp_path / "results.jsonl"
        return gpu.records.Recorder(part, path, "a card", "a command", deadline, is_dry)

    return make


@pytest.fixture
def check(gpu):
    """`benchmarks/gpu_check.py` as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", BENCHMARKS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def run_part(part, folder, comfyui=None):
    """Runs one part of the dry run in its own process, as started by gpu_check.py."""
    results = folder / "results.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"COMFYUI_PATH": str(comfyui)} if comfyui else {}
    ended = subprocess.run(
        [sys.executable, "-m", "gpu", part, "--dry-run", "--results", results, "--card", "CPU"],
        cwd=BENCHMARKS,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = [json.loads(line) for line in results.read_text().splitlines()]
    failed = [row for row in found if row["kind"] == "failed" or row["passed"] is False]
    assert failed == []
    return {row["name"]: row for row in found}


def test_part_a_measures_what_the_others_need(gpu, tmp_path):
    found = run_part("A", tmp_path)
    facts = importlib.import_module("gpu.facts")
    for name in (facts.PRODUCT_RATE, facts.COPY_RATE):
        assert found[name]["value"] > 0
    assert found["scaled fp8 is decoded exactly"]["passed"]


def test_part_b_starts_trainings_and_resumes_one_bit_exactly(tmp_path):
    found = run_part("B", tmp_path)
    assert found["resume is bit-equal, deterministic"]["passed"]
    assert found["sample and decode, ends well"]["passed"]
    assert found["python -m lora_core estimate"]["passed"]
    assert found["out of memory"]["kind"] == "skipped"


def test_part_c_finds_the_marked_tests(tmp_path):
    found = run_part("C", tmp_path)
    assert found["tests run"]["value"] >= 4


@pytest.mark.nightly
@pytest.mark.comfy
def test_part_e_compares_both_patchers_and_the_merge(tmp_path, comfyui_path):
    found = run_part("E", tmp_path, comfyui_path)
    assert found["dynamic VRAM"]["kind"] == "skipped"
    assert found["dynamic, fp8_scaled, the base is bit-equal afterwards"]["passed"]
    # The LoRA has an effect, relative to which the two ways are equal.
    assert found["bf16, side path - merge"]["value"] < 1e-3
    assert found["legacy, bf16, r2, two calls, kernels"]["value"] > 0


@pytest.mark.nightly
def test_part_f_trains_beside_a_plain_loop(tmp_path):
    found = run_part("F", tmp_path)
    assert found["bf16 r2 auto, losses are finite"]["passed"]
    assert found["bf16 r2 auto, attention"]["value"] > 0
    assert found["plain loop / ours, r2"]["value"] > 0
    assert found["nf4 r2 true, 1 blocks in host memory, peak"]["value"] > 0
    assert found["loading from the disk"]["value"] > 0


@pytest.mark.comfy
def test_part_g_leaves_the_base_unchanged(tmp_path, comfyui_path):
    found = run_part("G", tmp_path, comfyui_path)
    assert found["1 MP, the base is bit-equal afterwards"]["passed"]
    assert found["strength change, node and sampler"]["value"] > 0


@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        *((5, "<= 5", True), (5.1, "<= 5", False), (0.5, ">= 0.5", True), (0.4, ">= 0.5", False)),
        *((0, "== 0", True), (1, "< 1", False), (float("nan"), "<= 5", False)),
    ],
)
def test_a_value_is_within_its_limit_or_not(gpu, value, limit, expected):
    assert gpu.records.is_within(value, limit) is expected


def test_a_missed_goal_is_reported_and_is_not_a_failure(gpu, make_recorder, capsys):
    recorder = make_recorder()
    recorder.goal("idle", 0.2, "", "< 0.05")
    recorder.goal("ratio", 1.6, "", ">= 1.5")
    records = gpu.records.read_records(recorder.path)
    assert not gpu.records.has_failed(records)
    gpu.records.print_table(records)
    printed = capsys.readouterr().out
    assert "idle" in printed
    assert "missed" in printed
    assert "goals: 1 of 2" in printed


def test_a_violated_requirement_is_a_failure(gpu, make_recorder):
    recorder = make_recorder()
    recorder.limit("memory", 0.3, "", "<= 0.15")
    assert gpu.records.has_failed(gpu.records.read_records(recorder.path))


def test_a_dry_run_judges_requirements_but_no_limits(gpu, make_recorder):
    recorder = make_recorder(is_dry=True)
    recorder.limit("memory", 0.3, "", "<= 0.15")
    recorder.goal("idle", 0.9, "", "< 0.05")
    assert not gpu.records.has_failed(gpu.records.read_records(recorder.path))
    recorder.must("bit-equal", False)
    assert gpu.records.has_failed(gpu.records.read_records(recorder.path))


def test_an_item_that_fails_is_a_record_and_the_next_one_runs(gpu, make_recorder):
    recorder = make_recorder()
    with recorder.item("first"):
        raise RuntimeError("no kernel for this card")
    with recorder.item("second"):
        recorder.figure("a figure", 1.0)
    first, second = gpu.records.read_records(recorder.path)
    assert (first.kind, first.name) == ("failed", "first")
    assert "no kernel for this card" in first.note
    assert second.value == 1.0
    assert gpu.records.has_failed([first, second])


def test_an_item_without_enough_time_is_skipped_and_reported(gpu, make_recorder):
    recorder = make_recorder(deadline=0.0)
    assert not recorder.has_time("compile", 50)
    (record,) = gpu.records.read_records(recorder.path)
    assert (record.kind, record.name) == ("skipped", "compile")
    assert make_recorder().has_time("compile", 50)


def test_a_partial_line_of_a_killed_process_is_skipped(gpu, make_recorder):
    recorder = make_recorder()
    recorder.figure("whole", 1.0)
    with recorder.path.open("a") as file:
        file.write('{"part": "A", "na')
    assert [r.name for r in gpu.records.read_records(recorder.path)] == ["whole"]


def test_unused_time_goes_to_the_next_part_within_the_limit(check):
    parts = list(check.SECONDS)
    plans = check.plan_ends(parts, 1000.0, 1522.0, False)
    assert plans["A"] == 1000 + check.SECONDS["A"]
    assert plans["B"] == plans["A"] + check.SECONDS["B"]
    assert sum(check.SECONDS.values()) <= 522
    assert max(check.plan_ends(parts, 1000.0, 1400.0, False).values()) == 1400
    assert parts[:4] == ["A", "B", "E", "F"]


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_part_at_its_limit_is_terminated_with_its_children(gpu, tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with (tmp_path / "log").open("w") as log:
        process = gpu.children.start_group(
            [sys.executable, "-c", code], log, os.environ, stdout=subprocess.PIPE, text=True
        )
        child_id = int(process.stdout.readline())
        assert gpu.children.wait(process, 0.0) == gpu.children.TIMED_OUT
        process.stdout.close()
    wait_until_gone(child_id)


def wait_until_gone(process_id: int) -> None:
    """Returns once a killed process has ended; a zombie counts as ended."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"{process_id} still runs")


def event(category, name, start, duration):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_a_trace_is_split_by_what_its_kernels_do(gpu):
    found = gpu.traces.read_events(
        [
            event("kernel", "pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", 0, 100),
            event("kernel", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 100, 50),
            event("kernel", "nvjet_tst_192x192_64x4_2x1_v_bz_TNT", 150, 200),
            event("kernel", "sm90_xmma_gemm_bf16bf16", 350, 50),
            event("kernel", "void at::native::vectorized_elementwise_kernel<4>", 350, 100),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 500, 10),
            event("cuda_runtime", "cudaDeviceSynchronize", 400, 600),
            {"ph": "i", "cat": "kernel", "name": "an instant", "ts": 2},
        ]
    )
    kinds = {kind: round(seconds * 1e6) for kind, seconds in found.kinds_s.items()}
    assert kinds == {"attention": 150, "products": 250, "element-wise": 100, "copies": 10}
    assert found.num_kernels == 5
    assert found.copies["HtoD"] == 1
    assert found.busy_s == pytest.approx(460e-6)  # overlapping intervals count once
    assert found.wall_s == pytest.approx(1000e-6)
    assert found.waiting_s == pytest.approx(600e-6)


def test_failures_of_tests_are_read_one_by_one(gpu, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>'
        '<testcase name="c"><failure message="1 is not 2"/></testcase></testsuite></testsuites>'
    )
    counts, failures = gpu.pytest_runs.read_report(report)
    assert counts == {"run": 3, "skipped": 1, "failed": 1}
    assert failures == [("c", "1 is not 2")]


@pytest.fixture
def carried(gpu, tmp_path, monkeypatch):
    """A small `.gpu/` with one wheel and a ComfyUI of two files."""
    folder = tmp_path / ".gpu"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tool-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tool/__init__.py", "answer = 42\n")
        wheel.writestr("tool-1.data/purelib/beside.py", "")
    comfyui = tmp_path / "ComfyUI"
    (comfyui / "comfy" / "t5_tokenizer").mkdir(parents=True)
    (comfyui / "comfy" / "sd.py").touch()
    (comfyui / "comfy" / "t5_tokenizer" / "tokenizer.json").write_text("{}")
    (comfyui / "main.py").touch()
    gpu.bundle.pack_comfyui(comfyui, folder / gpu.bundle.COMFYUI)
    python = "{}.{}".format(*sys.version_info[:2])
    (folder / gpu.bundle.MANIFEST).write_text(json.dumps({"python": python}))
    monkeypatch.setattr(gpu.bundle, "BUNDLE", folder)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "elsewhere"))
    return folder


def test_the_bundle_is_found_and_unpacked(gpu, carried, tmp_path):
    environment = gpu.bundle.find_environment(tmp_path / "temporary")
    code = "import tool, beside, av, av.container\nfrom av.video import Frame\nprint(tool.answer)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.strip() == "42", ended.stderr
    comfyui = Path(environment["COMFYUI_PATH"])
    files = {p.relative_to(comfyui).as_posix() for p in comfyui.rglob("*") if p.is_file()}
    assert files == {"main.py", "comfy/sd.py"}


def test_inside_the_venv_the_bundle_is_not_used(gpu, carried, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    assert gpu.bundle.find_environment(tmp_path / "temporary") == {}


def test_a_bundle_for_another_python_is_ignored(gpu, carried, tmp_path, capsys):
    (carried / gpu.bundle.MANIFEST).write_text('{"python": "3.99"}')
    assert gpu.bundle.find_environment(tmp_path / "temporary") == {}
    assert ".gpu is for Python 3.99" in capsys.readouterr().out


def test_a_bundle_over_the_size_limit_is_refused(gpu, carried, monkeypatch):
    gpu.bundle.check_size(carried)
    monkeypatch.setattr(gpu.bundle, "MAX_BYTES", 1000)
    with pytest.raises(gpu.bundle.BundleError, match="must take 0 MB at most"):
        gpu.bundle.check_size(carried)


def test_the_archive_of_comfyui_holds_no_large_vocabulary(carried, gpu):
    with tarfile.open(carried / gpu.bundle.COMFYUI) as archive:
        assert not any("tokenizer" in name for name in archive.getnames())


def test_without_a_gpu_it_ends_at_once_with_one_line(check, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check, "find_card", lambda: "unknown")
    monkeypatch.setattr(check, "has_gpu", lambda environment: False)
    assert check.main(["--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("gpu_check: PyTorch finds no GPU here; --dry-run")


def test_an_unknown_part_is_refused(check, capsys):
    with pytest.raises(SystemExit):
        check.parse_options(["--parts", "A,Z"])
    assert "--parts takes A, B, E, F, G, C, D, but found Z" in capsys.readouterr().err


def test_the_operations_of_a_step_match_the_formula():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import train_loops\n"
        "print([round(train_loops.count_flops(8192, 256, 3072, 60, r) / 1e12) for r in (16, 64)])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, BENCHMARKS], capture_output=True, text=True, check=False
    )
    # 60 x [48 w^2 S + 108 r w S + 12 w S^2] with w = 3072 and S = 8448
    assert ended.stdout.strip() == "[390, 398]", ended.stderr
