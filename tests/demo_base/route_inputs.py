"""Generated requests to our HTTP routes, and the form that every answer has."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from .route_server import Answer, encode

MAX_MESSAGE = 400
#: All statuses of our routes; the rest of ComfyUI answers other paths in its own way.
OURS = {200, 400, 403, 404, 405, 409, 413}


def check_form(answer: Answer, folder: Path, is_ours: bool = True) -> None:
    """Never a 500, never NaN, never a path of this machine, and one sentence for a refusal."""
    assert answer.status < 500, (answer.status, answer.body[:500])
    if not is_ours:
        return
    assert answer.status in OURS
    if answer.headers.get("Content-Type", "").startswith("application/json"):
        value = answer.read()  # no NaN
        assert str(folder) not in answer.body.decode()
        if answer.status != 200:
            assert value.keys() == {"error"}
            sentence = value["error"]
            assert 0 < len(sentence.strip()) <= len(sentence) <= MAX_MESSAGE, sentence
            assert sentence.isprintable()


def is_route(name: str, path: str) -> bool:
    """Whether aiohttp routes the path to us: no part of it is empty or a dot."""
    return name not in ("", ".", "..") and not path.endswith(("/", "/.", "/.."))


def write_query(query: dict[str, str]) -> str:
    found = "&".join(f"{name}={encode(value)}" for name, value in query.items())
    return f"?{found}" if found else ""


TEXTS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["..", ".", "\0", "\ud800", "%2e%2e", "../config.json", "x" * 3000, "/etc"]),
    st.from_regex(r"\d{8}-\d{6}-[0-9a-f]{8}", fullmatch=True),
    st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(min_value=-(10**400), max_value=10**400),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**63, 2**64, 1e308, 5e-324]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)

METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "X"])
HEADERS = st.dictionaries(
    st.sampled_from(["Host", "Origin", "Sec-Fetch-Site", "Content-Type", "Accept"]),
    st.sampled_from(
        [
            *("127.0.0.1", "localhost:1", "[::1]:8188", "evil.localhost", "http://127.0.0.1"),
            *("http://127.0.0.1:9", "null", "same-origin", "same-site", "none", "text/plain"),
            *("application/json", "application/json; charset=utf-16", "[", "]", ":", "a b", "@"),
        ]
    ),
)


def build_bodies(options: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    """Bodies of these options, of any other JSON, and of no JSON at all."""
    return st.one_of(
        options.map(lambda value: json.dumps(value).encode()),
        options.map(lambda value: json.dumps(value, ensure_ascii=False).encode(errors="replace")),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=200),
        st.integers(min_value=1, max_value=30_000).map(lambda depth: b'{"a":' * depth),
        st.integers(min_value=60_000, max_value=70_000).map(lambda n: b'{"a": "' + b"x" * n),
    )
