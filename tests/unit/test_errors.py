"""Messages of errors are printable."""

from __future__ import annotations

import pytest

from longhaul.errors import UserError, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naïve 北京 🚢\n\ttab", "naïve 北京 🚢\n\ttab"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("exe\u202egnp.\u2066", "exe\\u202egnp.\\u2066"),
        ("a\rb\x00\x9b", "a\\rb\\x00\\x9b"),
        ("\ud83d", "\\ud83d"),
        ("x" * 8001, "x" * 8000 + "…"),
        ("x" * 8000, "x" * 8000),
    ],
)
def test_text_is_printable(text: str, expected: str):
    assert printable(text) == expected
    error = UserError(text, text)
    assert (error.message, error.hint, str(error)) == (expected, expected, f"{expected}\n  remedy: {expected}")
