"""`.gpu/`: what a bare machine with a GPU lacks, in a portable folder.

Bare means Python with torch, torchvision, torchaudio, transformers, accelerate, peft, safetensors,
einops, aiohttp, scipy, pytest and their dependencies, but no network. Wheels stay zipped until the
check unpacks them into a temporary folder; versions are those of the Python that prepares them.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .settings import ROOT

BUNDLE = ROOT / ".gpu"
MANIFEST, COMFYUI, BITSANDBYTES = "manifest.json", "comfyui.tar.xz", "bitsandbytes.tar.xz"
#: Size limit in bytes of the folder and the checkout together, so both can be carried at once.
MAX_BYTES = 52e6

WHEELS = (
    *("diffusers", "importlib_metadata", "lazy-importer"),
    *("SQLAlchemy", "alembic", "Mako", "pydantic", "pydantic_core"),
    *("annotated-types", "typing-inspection", "blake3", "comfy_aimdo", "comfy_kitchen"),
    *("torchsde", "trampoline", "simpleeval", "gguf", "schedulefree", "prodigyopt"),
)
#: Packages of which the platform-independent wheel is taken: others contain 45 MB of kernels.
ANY_SYSTEM = ("comfy_kitchen",)
GLIBC = (17, 24, 27, 28, 31, 34, 35)
#: bitsandbytes for CPUs, and for the CUDA version that the bare machine's torch is built with.
LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")

COMFYUI_FOLDERS = ("comfy", "comfy_extras", "comfy_execution", "comfy_config", "app", "utils")
COMFYUI_FOLDERS += ("comfy_api", "comfy_api_nodes", "alembic_db", "middleware", "api_server")
#: Vocabularies of text encoders that are not Qwen-Image's, half of ComfyUI's size.
LEFT_OUT = ("llama_tokenizer", "qwen35_tokenizer", "t5_tokenizer", "t5_pile_tokenizer")
LEFT_OUT += ("hydit_clip_tokenizer", "ace_lyrics_tokenizer", "__pycache__")

#: PyAV, a wheel of 36 MB, which ComfyUI imports everywhere but this check never calls.
AV_STUB = '''
    """Stands in for PyAV: everything imports and nothing works."""

    import importlib.abc
    import importlib.machinery
    import sys
    import types


    class Missing(types.ModuleType):
        __path__: list = []

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (Exception,), {})


    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name, path=None, target=None):
            if name.startswith("av."):
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
            return None

        def create_module(self, spec):
            return Missing(spec.name)

        def exec_module(self, module):
            pass


    sys.meta_path.append(Finder())
    sys.modules[__name__].__class__ = Missing
    __version__ = "0"
    time_base = 1
'''


class BundleError(Exception):
    """Something the user can act on; its text is the whole message."""


def find_environment(folder: Path) -> dict[str, str]:
    """Unpacks `.gpu/` and returns the environment for the parts; empty inside `.venv`."""
    if Path(sys.prefix) == ROOT / ".venv" or not (BUNDLE / MANIFEST).is_file():
        return {}
    wanted = json.loads((BUNDLE / MANIFEST).read_text())["python"]
    found = "{}.{}".format(*sys.version_info[:2])
    if wanted != found:
        print(f"gpu_check: .gpu is for Python {wanted}, this is {found}: it is left alone.")
        return {}
    site, comfyui = folder / "site", folder / "ComfyUI"
    unpack(site, comfyui)
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    joined = os.pathsep.join(path for path in paths if path)
    return {"PYTHONPATH": joined, "COMFYUI_PATH": str(comfyui)}


def unpack(site: Path, comfyui: Path) -> None:
    """Unpacks wheels as pip would, without their scripts."""
    for wheel in sorted(BUNDLE.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for libraries in (*site.glob("*.data/purelib"), *site.glob("*.data/platlib")):
        shutil.copytree(libraries, site, dirs_exist_ok=True)
    for name, target in ((BITSANDBYTES, site), (COMFYUI, comfyui)):
        if (BUNDLE / name).is_file():
            with tarfile.open(BUNDLE / name) as archive:
                archive.extractall(target, filter="data")
    (site / "av").mkdir(exist_ok=True)
    (site / "av" / "__init__.py").write_text(textwrap.dedent(AV_STUB).lstrip())


def prepare(python: str) -> None:
    """Collects everything afresh, for this version of Python on Linux and x86-64.

    Raises:
        BundleError: pip does not find something, or everything together is too large to carry.
    """
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".gpu-") as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        versions = {name: find_version(name) for name in (*WHEELS, "bitsandbytes")}
        known = {name: version for name, version in versions.items() if version}
        for name in WHEELS:
            if name not in known:
                print(f"left out, as it is not installed here: {name}", flush=True)
        wheels = {name: version for name, version in known.items() if name in WHEELS}
        usual = [f"{n}=={v}" for n, v in wheels.items() if n not in ANY_SYSTEM]
        download(usual, python, folder)
        anywhere = [f"{n}=={v}" for n, v in wheels.items() if n in ANY_SYSTEM]
        download(anywhere, python, folder, platforms=("any",))
        if "bitsandbytes" in known:
            reduce_bitsandbytes(known["bitsandbytes"], python, folder, Path(temporary))
        pack_comfyui(find_comfyui(), folder / COMFYUI)
        manifest = {"python": python, "versions": known}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        check_size(folder)
        if BUNDLE.exists():
            shutil.rmtree(BUNDLE)
        folder.rename(BUNDLE)


def find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def download(
    requirements: Iterable[str],
    python: str,
    folder: Path,
    platforms: Iterable[str] = tuple(f"manylinux_2_{n}_x86_64" for n in GLIBC),
) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--python-version", python]
    command += ["--implementation", "cp", f"--dest={folder}"]
    command += [f"--platform={platform}" for platform in platforms]
    ended = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        raise BundleError(
            f"pip download must give wheels for Python {python}, but failed: "
            f"{' '.join(lines)[-400:]}. Check the network and the versions that .venv has."
        )


def reduce_bitsandbytes(version: str, python: str, folder: Path, temporary: Path) -> None:
    """Removes the libraries for other CUDA versions from its wheel."""
    download([f"bitsandbytes=={version}"], python, temporary)
    (wheel,) = temporary.glob("bitsandbytes-*.whl")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(folder / BITSANDBYTES, "w:xz") as tar:
        for name in archive.namelist():
            file = Path(name).name
            if file.endswith((".so", ".dll", ".dylib")) and file not in LIBRARIES:
                continue
            data = archive.read(name)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def find_comfyui() -> Path:
    comfyui = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui")).resolve()
    if not (comfyui / "main.py").is_file():
        raise BundleError(f"needs ComfyUI, but {comfyui} has no main.py: run dev.py setup first")
    return comfyui


def pack_comfyui(comfyui: Path, path: Path) -> None:
    """Packs what importing it and running a model need."""

    def choose(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if LEFT_OUT_SET & set(Path(info.name).parts) else info

    with tarfile.open(path, "w:xz") as tar:
        for name in COMFYUI_FOLDERS:
            if (comfyui / name).is_dir():
                tar.add(comfyui / name, name, filter=choose)
        for file in sorted(comfyui.iterdir()):
            if file.is_file() and file.suffix in (".py", ".toml", ".txt", ".ini", ".yaml"):
                tar.add(file, file.name)


LEFT_OUT_SET = frozenset(LEFT_OUT)


def check_size(folder: Path) -> None:
    """Prints the contents, and how much of the size limit they take together with the checkout."""
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name, size in sorted(files.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.2f} MB  {name}")
    bundle, checkout = sum(files.values()), measure_checkout()
    print(f"{bundle / 1e6:8.2f} MB  .gpu\n{checkout / 1e6:8.2f} MB  the checkout", flush=True)
    if bundle + checkout > MAX_BYTES:
        raise BundleError(
            f".gpu and the checkout must take {MAX_BYTES / 1e6:.0f} MB at most, but take "
            f"{(bundle + checkout) / 1e6:.1f}: leave something out."
        )


def measure_checkout() -> int:
    """Size in bytes of all files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / name for name in found.stdout.split("\0") if name]
    return sum(path.stat().st_size for path in files if path.is_file())
