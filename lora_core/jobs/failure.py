"""Why a job ended badly, in a sentence, with what to do about it."""

from __future__ import annotations

import os
import signal

from ..errors import FileError, LoraError, OutOfMemoryError
from ..messages import message
from ..text import flatten
from ..training.config.config import TrainConfig
from ..training.machine.memory import is_out_of_memory
from .folder import JobFolder, open_inside
from .job import JobFailure
from .log_pieces import hide_paths, read_piece
from .nccl import explain_shared_memory, is_communication_error

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 16384
#: Signals that a process raises by its own fault.
OWN_SIGNALS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS")

LOWER = message("lower what the run needs and clone the job")
LOOK_AT_LOG = message("read the end of the log")
USE_ONE_GPU = message(
    "set NCCL_DEBUG=WARN to see why the GPUs cannot reach each other, or use one GPU"
)
RESUME = message("resume the job: it continues from its last checkpoint")


def explain_error(error: BaseException, config: TrainConfig) -> JobFailure:
    """For an exception that a worker caught."""
    if isinstance(error, OutOfMemoryError):
        return JobFailure(
            sentence=message("{sentence}; {lower}", sentence=error.sentence, lower=LOWER),
            advice=error.advice,
        )
    if is_out_of_memory(error):
        from ..training.config.advice import advise

        is_host = isinstance(error, MemoryError)
        where = message("the computer") if is_host else message("the device")
        return JobFailure(
            sentence=message("{where} ran out of memory; {lower}", where=where, lower=LOWER),
            advice=advise(config),
        )
    if isinstance(error, LoraError):
        return JobFailure(sentence=flatten(error.message))
    text = hide_paths(" ".join(str(error).split()))  # before a part of a path is left of it
    advice: tuple[str, ...] = (LOOK_AT_LOG,)
    if is_communication_error(error):
        count = int(os.environ.get("WORLD_SIZE", "1"))
        sentence = explain_shared_memory(count, os.environ)
        advice = (*([sentence] if sentence else []), USE_ONE_GPU, LOOK_AT_LOG)
    return JobFailure(
        sentence=message(
            "training stopped with {name}: {text}",
            name=type(error).__name__,
            text=text or message("no further text"),
        ),
        advice=advice,
    )


def explain_death(exit_code: int | None, folder: JobFolder, restarts: int = 0) -> JobFailure:
    """For a worker that died without reporting why.

    Args:
        exit_code: negative for a signal; None where it is unknown.
        restarts: how many times in a row it was killed before.
    """
    tail = read_log_tail(folder)
    again = message(" {number} times in a row", number=restarts + 1) if restarts else ""
    advice: tuple[str, ...] = (RESUME, LOOK_AT_LOG)
    if exit_code is None:
        sentence = message(
            "the worker disappeared{again} without a message: it was killed or the computer shut "
            "down",
            again=again,
        )
    elif exit_code < 0:
        name = name_signal(-exit_code)
        sentence = message("the worker was terminated{again} by {name}", again=again, name=name)
        if name in OWN_SIGNALS:
            sentence = message("the worker crashed with {name}", name=name)
            advice = (message("update the GPU's driver and PyTorch"), LOOK_AT_LOG)
        elif name == "SIGKILL":
            sentence += message(", manually or because the computer ran out of memory")
            advice = (message("free main memory, or choose a smaller model.storage"), *advice)
    else:
        sentence = message(
            "the worker ended with exit code {exit_code} before it could report why",
            exit_code=exit_code,
        )
        advice = (LOOK_AT_LOG,)
    return JobFailure(sentence=sentence, advice=advice, exit_code=exit_code, log_tail=tail)


def is_from_outside(exit_code: int | None) -> bool:
    """Whether the worker was ended from outside, so that a retry makes sense."""
    return exit_code is None or (exit_code < 0 and name_signal(-exit_code) not in OWN_SIGNALS)


def name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return message("signal {number}", number=number)


def read_log_tail(folder: JobFolder) -> str:
    try:
        with open_inside(folder.log) as file:
            text = read_piece(file, None, LOG_TAIL_BYTES)["text"]
    except (FileError, OSError):
        return ""
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
