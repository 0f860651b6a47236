"""Tests on GPUs write down what they measured, as benchmarks do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
