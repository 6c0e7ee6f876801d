"""The panel's texts: each used one exists, in every language, with the same placeholders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WEB = Path(__file__).resolve().parents[1] / "web"
WORDS = WEB / "words"
LANGUAGES = sorted(path.stem for path in WORDS.glob("*.js"))
#: Prefixes of keys that are built from a value.
STEM = re.compile(r"`([\w.]+\.)\$\{")
ENTRY = re.compile(r'^  "([\w.-]+)":\s+"((?:[^"\\]|\\.)*)",$', re.MULTILINE)
PLACE = re.compile(r"\{(\w+)\}")
#: A word's form that goes with a number: {n:pair|pairs}.
PLURAL = re.compile(r"\{(\w+):([^{}]*)\}")
#: Plural categories of a language, see web/translation.js.
NUM_FORMS = {"en": 2, "zh": 1}


def read_words(language: str) -> dict[str, str]:
    text = (WORDS / f"{language}.js").read_text(encoding="utf-8")
    found = ENTRY.findall(text)
    assert len(found) == text.count('":'), "an entry that this test does not understand"
    words = dict(found)
    assert len(words) == len(found), "a key stands twice"
    return words


ENGLISH = read_words("en")
CODE = "\n".join(p.read_text("utf-8") for p in WEB.rglob("*.js") if p.parent != WORDS)


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "en"])
def test_a_language_has_every_text_with_its_placeholders(language):
    words = read_words(language)
    assert words.keys() == ENGLISH.keys()
    for key, text in words.items():
        assert text.strip()
        assert set(PLACE.findall(text)) == set(PLACE.findall(ENGLISH[key])), key


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_word_has_a_form_for_each_plural_category_of_its_language(language):
    for key, text in read_words(language).items():
        rest = PLURAL.sub("", text)
        assert not re.search(r"[{}]", PLACE.sub("", rest)), key
        for name, forms in PLURAL.findall(text):
            assert len(forms.split("|")) == NUM_FORMS[language], key
            assert name in PLACE.findall(ENGLISH[key]), key


def test_every_text_that_is_used_exists():
    asked = set(re.findall(r'\b(?:t|say)\(\s*"([\w.-]+)"', CODE))
    assert len(asked) > 20
    assert asked - ENGLISH.keys() == set()


def test_no_unused_text_is_left():
    quoted = set(re.findall(r'"([\w-]+(?:\.[\w-]+)+)"', CODE))
    stems = tuple(STEM.findall(CODE))
    forgotten = [key for key in ENGLISH.keys() - quoted if not key.startswith(stems)]
    assert forgotten == []
