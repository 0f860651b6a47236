"""Pauses before suspicious measurements are repeated: a host that is busy for some seconds must not cost its node."""

from __future__ import annotations

REPETITION_PAUSES_S = (0.0, 2.0, 10.0)
"""One repetition after each pause. A node is named only if it is slow in all of them."""
