"""Our numbers as JSON that every reader accepts: NaN and the infinities become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def write_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(drop_non_finite(value), indent=indent, allow_nan=False)


def drop_non_finite(value: Any) -> Any:
    """The same with None for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            drop_non_finite(key) if isinstance(key, float) else key: drop_non_finite(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [drop_non_finite(item) for item in value]
    return value
