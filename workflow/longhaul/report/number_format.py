"""Formats numbers for people: `1.23 M`, `3.4 GiB`, `4 min 12 s`, `12 %`; a missing value becomes an en dash."""

from __future__ import annotations

import math

MISSING = "–"
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2**50, "PiB"), (2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_DURATIONS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def finite(value: object) -> float | None:
    """Return the value as a finite float, or None for anything else, such as null, NaN or infinity in a metrics file."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def exact(value: int | None) -> str:
    """Return a whole number with all its digits."""
    return MISSING if value is None else f"{value:,}"


def count(value: object) -> str:
    """Return a count: exact below 10,000, above with three significant digits and a unit (k, M, B, T, P)."""
    number = finite(value)
    if number is None:
        return MISSING
    if abs(number) < 10_000:
        return f"{number:,.0f}" if number == round(number) else significant(number)
    return _scaled(number, _DECIMAL)


def size(value: object) -> str:
    """Return a number of bytes in B, KiB, MiB, GiB, TiB or PiB."""
    number = finite(value)
    if number is None:
        return MISSING
    return f"{number:.0f} B" if abs(number) < 1024 else _scaled(number, _BINARY)


def _scaled(number: float, units: tuple[tuple[float, str], ...]) -> str:
    for index, (unit, name) in enumerate(units):
        # A value that rounds to 1,000 of a unit is shown as 1 of the next unit.
        if abs(number) >= unit * (0.9995 if index < len(units) - 1 else 1):
            return f"{significant(number / unit)} {name}"
    return significant(number)


def estimate(span: tuple[float, float] | None) -> str:
    """Return the lowest and the highest value of an estimate, `898 to 1,350`; one number where both read the same."""
    if span is None:
        return MISSING
    low, high = (significant(value) for value in span)
    return low if low == high else f"{low} to {high}"


def significant(value: object, digits: int = 3) -> str:
    """Return `digits` significant digits, without exponent from 0.001 to 1,000,000, and without trailing zeros."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(number)))
    rounded = round(number, decimals)
    if not 1e-3 <= abs(rounded) < 1e6:
        mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
        return f"{_without_trailing_zeros(mantissa)}e{int(exponent)}"
    return _without_trailing_zeros(f"{rounded:,.{max(0, decimals)}f}")


def _without_trailing_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def nats(value: object) -> str:
    """Return a loss in nats per token with three decimals."""
    number = finite(value)
    return MISSING if number is None else f"{number:.3f}"


def percent(value: object) -> str:
    """Return a fraction of 1 as a percentage."""
    number = finite(value)
    return MISSING if number is None else f"{significant(100 * number, 3 if number >= 0.1 else 2)} %"


def duration(value: object) -> str:
    """Return seconds in their two largest units: `850 ms`, `4.2 s`, `4 min 12 s`, `2 h 5 min`, `3 d 4 h`."""
    seconds = finite(value)
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{significant(seconds * 1000)} ms"
    if seconds < 59.95:
        return f"{significant(seconds)} s"
    index = next(i for i, (unit, _) in enumerate(_DURATIONS) if seconds >= unit * (1 if unit == 1 else 0.999))
    (large, large_name), (small, small_name) = _DURATIONS[index], _DURATIONS[index + 1]
    whole, rest = divmod(round(seconds / small), large // small)
    return f"{whole} {large_name} {rest} {small_name}" if rest else f"{whole} {large_name}"


def words(name: str) -> str:
    """Return a field's name as words: `gpus_per_node` -> `GPUs per node`."""
    text = name.replace("_", " ").replace("-", " ")
    spelling = {
        "gpu": "GPU",
        "gpus": "GPUs",
        "cpu": "CPU",
        "cpus": "CPUs",
        "nccl": "NCCL",
        "cuda": "CUDA",
        "zero": "ZeRO",
    }
    spelling |= {
        "gib": "GiB",
        "mfu": "MFU",
        "flops": "FLOPs",
        "deepspeed": "DeepSpeed",
        "id": "ID",
        "sha256": "SHA-256",
    }
    return " ".join(spelling.get(word, word) for word in text.split())


def _plain_number(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return significant(value, 4) if math.isfinite(value) else str(value)


def plain(value: object) -> str:
    """Return any JSON value as one line. Lists and dicts are written out, long fractions are shortened."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool | int | float):
        return _plain_number(value)
    if isinstance(value, dict):
        return ", ".join(f"{words(str(key))} {plain(entry)}" for key, entry in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value) or MISSING
    return str(value)
