"""The command line: `python -m lora_core inspect FILE`, and compare, resize, train, ..."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from .checks import show
from .disk.output_files import check_outputs
from .disk.safetensors_file import SUFFIXES, is_safetensors
from .errors import ConfigError, LoraError, NonFiniteWeightsError
from .formats.files import PEFT_CONFIG, PEFT_FILE, read_adapter, write_adapter
from .formats.layouts import MLP_LAYOUTS
from .formats.schemes import SCHEMES
from .inspection.compare import compare_adapters
from .inspection.inspection import inspect_adapter
from .inspection.statistics import SORT_KEYS
from .inspection.tables import build_comparison_table, build_table, describe_verdict
from .toolbox.compose import merge_adapters, resize_adapter
from .toolbox.composition import Composition
from .toolbox.extraction import extract_adapter
from .training.command_line import TRAINING_COMMANDS, add_commands
from .training.model.libraries import import_diffusers_alone

FAILED = 2  # argparse's exit status for a wrong command line
INTERRUPTED = 130
INDENT = 1


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    options = build_parser().parse_args(argv)
    if argv is None and options.command in TRAINING_COMMANDS:  # the process is this command's
        import_diffusers_alone()
    try:
        options.run(options)
        sys.stdout.flush()
    except LoraError as error:
        print(f"{options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader closed our output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_core", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("inspect", help="what a LoRA adds, and whether that is normal")
    command.add_argument("file", help="a LoRA, or a folder that PEFT or diffusers wrote")
    command.add_argument(
        "--base", metavar="MODEL", help="also compare with this model: a file, a GGUF or a folder"
    )
    command.add_argument("--exact", action="store_true", help="examine every entry")
    command.add_argument("--json", action="store_true", help="all statistics of every module")
    command.add_argument("--sort-by", choices=SORT_KEYS, default="std", help="order of the table")
    command.set_defaults(run=run_inspect)

    command = commands.add_parser("compare", help="compare two LoRAs")
    command.add_argument("a")
    command.add_argument("b")
    command.add_argument("--json", action="store_true", help="all statistics of every module")
    command.set_defaults(run=run_compare)

    command = commands.add_parser("resize", help="a lower rank with minimal loss")
    command.add_argument("file")
    add_output(command)
    command.add_argument("--rank", type=int, help="the maximum rank of a module")
    command.add_argument("--energy", type=float, help="share to keep of each module, such as 0.99")
    command.set_defaults(run=run_resize)

    command = commands.add_parser("merge", help="several LoRAs as one")
    add_output(command)
    command.add_argument(
        "files", nargs="+", metavar="FILE[:STRENGTH]", help="without a number, strength 1"
    )
    command.add_argument("--rank", type=int, help="the maximum rank; without it, the exact sum")
    command.set_defaults(run=run_merge)

    command = commands.add_parser("extract", help="a LoRA from a model and its fine-tune")
    command.add_argument("base", help="the original model: a file, a GGUF or a folder")
    command.add_argument("tuned", help="the fine-tuned model")
    add_output(command)
    command.add_argument("--rank", type=int, required=True)
    command.add_argument("--no-biases", action="store_true", help="leave out biases and norms")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    command.set_defaults(run=run_extract)

    command = commands.add_parser("convert", help="the same LoRA in another key format")
    command.add_argument("file")
    add_output(command)
    command.set_defaults(run=run_convert)

    add_commands(commands)
    return parser


def add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "out", help="the file to write, a new one; .safetensors is added if missing"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace the file to write if it exists"
    )
    command.add_argument("--format", choices=list(SCHEMES), default="comfyui", help="key format")
    command.add_argument(
        "--mlp-layout",
        choices=MLP_LAYOUTS,
        help="of Qwen-Image-2.1; by default the one that ComfyUI loads onto every base",
    )


def run_inspect(options: argparse.Namespace) -> None:
    adapter = read_adapter(options.file)
    inspection = inspect_adapter(adapter, base=options.base, exact=options.exact)
    if options.json:
        document = {**inspection.to_dict(), "report": adapter.report.to_dict()}
        print(json.dumps(document, indent=INDENT))
    else:
        table = build_table(inspection, options.sort_by)
        print(f"{describe_verdict(inspection)}\n\n{table}")


def run_compare(options: argparse.Namespace) -> None:
    comparison = compare_adapters(read_adapter(options.a), read_adapter(options.b))
    if options.json:
        print(json.dumps(comparison.to_dict(), indent=INDENT))
    else:
        print(f"{comparison.to_text()}\n\n{build_comparison_table(comparison)}")


def run_resize(options: argparse.Namespace) -> None:
    out = choose_out(options, [options.file])
    write(resize_adapter(read_adapter(options.file), options.rank, options.energy), out, options)


def run_merge(options: argparse.Namespace) -> None:
    pairs = [split_strength(text) for text in options.files]
    out = choose_out(options, [path for path, _ in pairs])
    adapters = [(read_adapter(path), strength) for path, strength in pairs]
    write(merge_adapters(adapters, options.rank), out, options)


def run_extract(options: argparse.Namespace) -> None:
    out = choose_out(options, [options.base, options.tuned])
    composition = extract_adapter(
        options.base,
        options.tuned,
        options.rank,
        biases=not options.no_biases,
        device=choose_device(options.device),
    )
    write(composition, out, options)


def choose_device(name: str) -> str:
    """Raises ConfigError where PyTorch has no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but PyTorch finds no GPU here; expected cpu")
    return name


def run_convert(options: argparse.Namespace) -> None:
    out = choose_out(options, [options.file])
    adapter = read_adapter(options.file)
    print(adapter.report.to_text())
    try:
        adapter.check_finite()
    except NonFiniteWeightsError as e:  # converting changes no number, so the user decides
        print(f"Warning: {e}")
    written = write_adapter(adapter, out, options.format, options.mlp_layout)
    print(f"Wrote {written}: {adapter.key_format} converted to {options.format}")


def write(composition: Composition, out: str, options: argparse.Namespace) -> None:
    print(composition.to_text())
    print(f"Wrote {write_adapter(composition.adapter, out, options.format, options.mlp_layout)}")


def choose_out(options: argparse.Namespace, inputs: list[str]) -> str:
    """The file to write, with the suffix that loaders require; PEFT's is a folder.

    Args:
        inputs: what the command reads, as given.

    Raises:
        ConfigError: it names no file, is an input, or exists and `--overwrite` is not given.
    """
    out = options.out
    if options.format == "peft":
        place = Path(out)
        folder = place.parent if place.name == PEFT_FILE else place
        files = [folder / PEFT_FILE, folder / PEFT_CONFIG]
    else:
        # Not pathlib's: to it "new/" and "new/." are the file "new".
        stem = os.path.basename(out)  # noqa: PTH119
        for suffix in SUFFIXES:
            stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
        if not stem.strip("."):
            raise ConfigError(
                "OUT is {out}, which names no file; expected one such as my_lora.safetensors",
                out=show(out),
            )
        out = out if is_safetensors(out) else f"{out}.safetensors"
        files = [Path(out)]
    # A LoRA may be named without its ending.
    named = [name for given in inputs for name in (given, f"{given}.safetensors")]
    check_outputs(files, named, options.overwrite)
    return out


def split_strength(text: str) -> tuple[str, float]:
    """ "a.safetensors:0.8" -> the file and 0.8; a file named by the whole text takes precedence.

    Raises:
        ConfigError: what follows the colon is not a number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):  # noqa: PTH110 - never raises
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        raise ConfigError(
            "{text!r} does not end in a strength; expected a file, or a file and a number such "
            "as 'my_lora.safetensors:0.8'",
            text=text,
        ) from None


if __name__ == "__main__":
    sys.exit(main())
