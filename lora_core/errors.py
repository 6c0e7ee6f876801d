"""What can go wrong, as one tree. Texts say what was expected, what came, and what to do.

LoraError
+-- FileError              the file cannot be read or written as what it should be
|   +-- MissingFileError   there is no such path
+-- KeyFormatError         keys that belong to no known scheme, or to another model
+-- ShapeError             tensors that do not fit each other or the model
|   +-- EmptyPartError     a tensor without any number
+-- TargetError            a preset, pattern or block range that selects nothing
+-- ConfigError            a setting outside its range
+-- NonFiniteWeightsError  NaN or Inf in the weights
+-- NonFiniteLossError     NaN or Inf in a training step
+-- OutOfMemoryError       memory ran out in a training step
"""

from __future__ import annotations

from .messages import join_messages, message


class LoraError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        text: its message, or the template of one if there are values; see `messages.message`.
    """

    def __init__(self, text: object = "", /, **values: object):
        self.message = message(text, **values)
        super().__init__(self.message)


class FileError(LoraError, ValueError):
    """The file is missing, damaged, of another type, or cannot be written."""


class MissingFileError(FileError):
    """There is no such file, which is no fault where the file is optional."""


class DeniedFileError(FileError):
    """The system does not let the file be opened now; on Windows perhaps a moment later."""


class KeyFormatError(LoraError, ValueError):
    """The keys are not those of a Qwen-Image adapter, or a module is incomplete."""


class ShapeError(LoraError, ValueError):
    """A tensor's shape contradicts its partner's or the model's."""


class EmptyPartError(ShapeError):
    """A tensor has no entries, as a shard that was not gathered."""


class TargetError(LoraError, ValueError):
    """A preset, pattern or block range matches nothing."""


class ConfigError(LoraError, ValueError):
    """A setting is unknown or outside its range."""


class NonFiniteWeightsError(LoraError, ValueError):
    """The weights hold NaN or Inf."""


class NonFiniteLossError(LoraError, ArithmeticError):
    """A training step gave NaN or Inf; the optimizer was not stepped."""


class OutOfMemoryError(LoraError, MemoryError):
    """Memory ran out in a training step, and there is nothing left to give up for it.

    Args:
        sentence: what ran out where, without a full stop.
        advice: what lowers the memory, the cheapest first.
    """

    def __init__(self, sentence: str, advice: tuple[str, ...]):
        text = message(
            "{sentence}. What lowers it: {advice}.",
            sentence=sentence,
            advice=join_messages("; ", advice),
        )
        super().__init__(text)
        self.sentence = sentence
        self.advice = advice


#: What systems say of files most often; the rest stays in the system's own words.
REASONS = (
    message("No such file or directory"),
    message("Permission denied"),
    message("Operation not permitted"),
    message("Is a directory"),
    message("Not a directory"),
    message("File exists"),
    message("File name too long"),
    message("Too many levels of symbolic links"),
    message("Too many open files"),
    message("Invalid argument"),
    message("Input/output error"),
    message("Device or resource busy"),
    message("Read-only file system"),
    message("Disk quota exceeded"),
    message("Stale file handle"),
    message("Access is denied"),
    message("The system cannot find the path specified"),
)


def get_reason(error: OSError) -> str:
    """What the system says of it, as a message if it is one of REASONS."""
    return next((one for one in REASONS if one == error.strerror), str(error.strerror))
