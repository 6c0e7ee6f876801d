"""dev.py sets up everything exactly once, and explains what it cannot do."""

import importlib.util
import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

DEV_PY = Path(__file__).resolve().parent.parent / "dev.py"


@pytest.fixture(scope="module")
def dev():
    spec = importlib.util.spec_from_file_location("dev", DEV_PY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """A checkout and a ComfyUI that have been set up, without the gigabytes."""
    root, comfyui = tmp_path / "checkout", tmp_path / "ComfyUI"
    for folder in (root / ".venv", comfyui):
        folder.mkdir(parents=True)
    (root / ".venv" / "pyvenv.cfg").write_text("version = 3.11.7\n")
    (root / "requirements-dev.txt").write_text("pytest==9.2.0\n")
    (comfyui / "main.py").touch()
    (comfyui / "requirements.txt").write_text("torch\n")
    return root, comfyui


def write_tar(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = 0 if info.issym() else 2
            tar.addfile(info, None if info.issym() else io.BytesIO(b"ok"))
    return path


def run_dev(*arguments, **environment):
    return subprocess.run(
        [sys.executable, DEV_PY, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("changed", ["requirements-dev.txt", "requirements.txt"])
def test_the_stamp_changes_with_our_requirements(dev, checkout, changed):
    root, comfyui = checkout
    before = dev.compute_stamp(root, comfyui)
    (root / changed).write_text("pytest==9.3.0\n")
    assert before
    assert dev.compute_stamp(root, comfyui) != before


def test_the_stamp_changes_with_comfyui_and_with_python(dev, checkout):
    root, comfyui = checkout
    stamps = {dev.compute_stamp(root, comfyui)}
    (comfyui / "requirements.txt").write_text("torch\nkornia\n")
    stamps.add(dev.compute_stamp(root, comfyui))
    (root / ".venv" / "pyvenv.cfg").write_text("version = 3.12.0\n")
    stamps.add(dev.compute_stamp(root, comfyui))
    stamps.add(dev.compute_stamp(root, comfyui.rename(comfyui.with_name("elsewhere"))))
    assert len(stamps) == 4


def test_a_second_setup_does_nothing(dev, checkout, monkeypatch):
    root, comfyui = checkout
    calls = []
    monkeypatch.setattr(dev, "make_venv", lambda root: calls.append("venv"))
    monkeypatch.setattr(dev, "install", lambda root, files, log: calls.append(files))
    environment = {"COMFYUI_PATH": str(comfyui)}
    assert dev.setup(root, environment) == comfyui
    assert len(calls) == 2
    assert dev.setup(root, environment) == comfyui
    assert len(calls) == 2


@pytest.fixture
def installing(dev, checkout, monkeypatch):
    """(the status uv ends with, whether pip has an index of its own) -> the programs' calls."""
    root, comfyui = checkout
    (root / "requirements.txt").write_text("safetensors\n")

    def run(status, has_own_index=False):
        calls = []

        def run_child(command, **options):
            calls.append(command)
            options["stdout"].write("no such package\n")
            return status if command[0] == str(dev.get_venv_script(root, "uv")) else 0

        monkeypatch.setattr(dev, "make_venv", lambda root: None)
        monkeypatch.setattr(dev, "has_own_index", lambda python: has_own_index)
        monkeypatch.setattr(dev, "run_child", run_child)
        dev.setup(root, {"COMFYUI_PATH": str(comfyui)})
        return calls

    files = [root / "requirements-dev.txt", root / "requirements.txt", comfyui / "requirements.txt"]
    run.files = [f"--requirement={path}" for path in files]
    return run


def test_all_requirement_files_go_into_one_call_of_uv(installing):
    pip, uv = installing(status=0)
    assert pip[-1].startswith("uv==")
    assert uv[1:3] == ["pip", "install"]
    assert uv[3:6] == installing.files


@pytest.mark.parametrize("has_own_index", [True, False])
def test_pip_installs_what_uv_cannot_or_may_not(installing, capsys, has_own_index):
    *_, pip = calls = installing(status=2, has_own_index=has_own_index)
    assert pip[1:3] == ["-m", "pip"]
    assert [argument for argument in pip if argument in installing.files] == installing.files
    assert len(calls) == (1 if has_own_index else 3)
    assert ("uv failed (its output was: no such package)" in capsys.readouterr().out) == (
        not has_own_index
    )


def test_an_index_of_the_users_own_is_seen(dev, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///more")  # beside PyPI, where all of ours is
    assert not dev.has_own_index(Path(sys.executable))
    monkeypatch.setenv("PIP_INDEX_URL", "file:///mine")
    assert dev.has_own_index(Path(sys.executable))


def test_a_comfyui_path_without_main_py_is_refused_with_a_message(tmp_path):
    result = run_dev("setup", COMFYUI_PATH=str(tmp_path))
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert (
        f"COMFYUI_PATH must be a ComfyUI checkout, but {tmp_path} has no main.py" in result.stdout
    )


def test_an_old_python_is_refused_with_a_message(dev):
    with pytest.raises(dev.DevError, match=r"needs Python 3\.10 or newer, but runs on 3\.8"):
        dev.check_python((3, 8))


def test_the_gpu_check_gets_its_arguments_in_order(dev, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(dev, "setup", lambda root, environment: tmp_path)
    monkeypatch.setattr(dev, "run", lambda command, comfyui: commands.append(command) or 3)
    assert dev.main(["gpu", "--parts", "A,F", "--dry-run"]) == 3
    check = dev.ROOT / "benchmarks" / "gpu_check.py"
    assert commands == [[dev.get_venv_python(dev.ROOT), check, "--parts", "A,F", "--dry-run"]]
    assert check.is_file()


@pytest.mark.parametrize(
    ("given", "handed_on", "fuzz"),
    [
        (["--all", "-x", "tests/fuzz"], ["-x", "tests/fuzz"], "all"),
        (["tests/fuzz", "--all"], ["tests/fuzz"], "all"),
        (["tests/fuzz"], ["tests/fuzz"], None),
    ],
)
def test_the_option_for_all_fuzzing_is_not_passed_to_pytest(
    dev, monkeypatch, tmp_path, given, handed_on, fuzz
):
    ran = []
    monkeypatch.setattr(dev, "run_child", lambda command, **options: ran.append((command, options)))
    monkeypatch.delenv("QWEN_EDIT_LORA_FUZZ", raising=False)
    dev.test(tmp_path, given)
    ((command, options),) = ran
    assert command[1:] == handed_on
    assert options["env"].get("QWEN_EDIT_LORA_FUZZ") == fuzz
    ran.clear()
    dev.test(tmp_path, ["--all"])
    ((command, options),) = ran
    assert "--dist=loadfile" in command
    assert options["env"]["QWEN_EDIT_LORA_FUZZ"] == "all"


def test_bench_runs_only_benchmarks_that_need_no_gpu(dev, monkeypatch, tmp_path):
    names = []
    monkeypatch.setattr(dev, "run", lambda command, comfyui: names.append(command[1].stem) or 0)
    assert dev.bench(tmp_path, []) == 0
    assert "apply" in names
    assert "gpu_check" not in names


def test_lint_shows_mypy_a_checkout_of_any_name_as_the_package(dev, tmp_path):
    root = tmp_path / "qwen-edit-lora (2)"
    root.mkdir()
    (root / "dev.py").touch()
    for _ in range(2):  # the second time finds it there
        dev.link_package(root)
        assert (root / ".mypy" / "qwen_edit_lora" / "dev.py").samefile(root / "dev.py")


def test_a_system_without_links_is_told_what_lint_needs(dev, tmp_path):
    (tmp_path / ".mypy").write_text("a file in the link's place")
    with pytest.raises(dev.DevError, match="needs a symbolic link at"):
        dev.link_package(tmp_path)


@pytest.mark.parametrize("failing", [None, "codespell", "mypy"])
def test_lint_runs_every_check_and_fails_with_any(dev, monkeypatch, capsys, tmp_path, failing):
    ran = []

    def run(command, comfyui):
        ran.append(command)
        return int(failing is not None and failing in map(str, (command[0].stem, *command)))

    monkeypatch.setattr(dev, "run", run)
    assert dev.lint(tmp_path) == (failing is not None)
    assert [c[0].stem for c in ran] == ["ruff", "ruff", "codespell", "oxlint", "python"]
    assert ("nothing to mend" in capsys.readouterr().out) == (failing is None)


def test_a_failing_pip_shows_the_end_of_its_log(dev, tmp_path):
    with pytest.raises(dev.DevError, match=r"check the network[\s\S]*unknown command"):
        dev.run_pip(Path(sys.executable), ["no-such-command"], tmp_path / "setup.log")


def test_only_the_subtree_is_extracted(dev, tmp_path):
    members = ("p-1/PKG-INFO", "p-1/vendor/ComfyUI/main.py", "p-1/vendor/ComfyUI/comfy/sd.py")
    archive = write_tar(tmp_path / "p.tar.gz", *members)
    dev.extract_subtree(archive, ("vendor", "ComfyUI"), tmp_path / "out")
    extracted = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert extracted == {"main.py", "comfy/sd.py"}


def test_a_member_outside_is_refused(dev, tmp_path):
    archive = write_tar(tmp_path / "p.tar.gz", "p-1/vendor/ComfyUI/../../../evil.py")
    with pytest.raises(dev.DevError, match="unsafe member"):
        dev.extract_subtree(archive, ("vendor", "ComfyUI"), tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("evil.py"))


def test_a_link_is_refused(dev, tmp_path):
    link = tarfile.TarInfo("p-1/vendor/ComfyUI/models")
    link.type, link.linkname = tarfile.SYMTYPE, "/"
    archive = write_tar(tmp_path / "p.tar.gz", link)
    with pytest.raises(dev.DevError, match="unsafe member"):
        dev.extract_subtree(archive, ("vendor", "ComfyUI"), tmp_path / "out")


def test_an_archive_without_the_subtree_is_refused(dev, tmp_path):
    archive = write_tar(tmp_path / "p.tar.gz", "p-1/PKG-INFO")
    with pytest.raises(dev.DevError, match="must hold vendor/ComfyUI"):
        dev.extract_subtree(archive, ("vendor", "ComfyUI"), tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize("ignores", ["", "import signal; signal.signal(2, signal.SIG_IGN); "])
def test_an_interrupt_ends_the_child_first(dev, tmp_path, ignores):
    """One that ignores SIGINT too, as a shell's background job does."""
    child = f"{ignores}import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import importlib.util, signal, sys\n"
        f"spec = importlib.util.spec_from_file_location('dev', {str(DEV_PY)!r})\n"
        "dev = importlib.util.module_from_spec(spec); spec.loader.exec_module(dev)\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n"
        f"    dev.run_child([sys.executable, '-c', {child!r}])\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        child_id = int(process.stdout.readline())
        process.terminate()
        assert process.wait(timeout=60) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(child_id, 0)


def test_a_taken_port_is_refused_with_a_message():
    from demo_base.server import ServerError, check_port, find_free_port

    port = find_free_port()
    check_port(port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ServerError, match=f"port {port} must be free"):
            check_port(port)


def test_the_frontend_of_a_test_run_is_split_off_and_must_be_a_version(dev):
    arguments = ["-x", "--frontend", "1.58.1", "tests/web"]
    assert dev.split_frontend(arguments) == (["-x", "tests/web"], "1.58.1")
    assert dev.split_frontend(["tests/web"]) == (["tests/web"], None)
    for version in (["--frontend"], ["--frontend", "newest"], ["--frontend", "../1.0"]):
        with pytest.raises(dev.DevError, match="needs a version such as"):
            dev.split_frontend(version)
