"""Ways to damage a JSON file: each of its values replaced by a wrong one, left out, and the file's bytes damaged."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import cycle
from typing import Any

WRONG_VALUES = (None, -1, "x", [], {}, True, 1e308, [{"a": 1}], "\u001b[31m", 10**30, 0.5, "../../x", 10**400)
DAMAGED_BYTES = (b"", b"\xff\xfe{", b"{", b"[]", b"null", b"7", b'"text"', b"[" * 5000, b'{"a": NaN}', b"\x00" * 9)


def tampered_texts(text: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (what was changed, the file's new bytes): every value of the JSON gets one wrong value, and is left out once."""
    value, wrong = json.loads(text), cycle(WRONG_VALUES)
    for place in _places(value):
        changed = copy.deepcopy(value)
        parent = _at(changed, place[:-1])
        parent[place[-1]] = replacement = next(wrong)
        yield f"{'.'.join(map(str, place))} is {replacement!r}", json.dumps(changed).encode()
        del parent[place[-1]]
        yield f"{'.'.join(map(str, place))} is missing", json.dumps(changed).encode()
    for damaged in (*DAMAGED_BYTES, text[: len(text) // 2]):
        yield f"bytes {damaged[:12]!r}", damaged


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from _places(inner, (*place, key))


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value
