"""Suffixes of data files and their formats (.jsonl, .json, .parquet, .csv, .txt, .arrow; .gz, .zst); files that are no data."""

from __future__ import annotations

import re
from pathlib import Path

FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".zst": "zstd"}
KNOWN_SUFFIXES = ", ".join(sorted(FORMAT_OF_SUFFIX))
# Files that describe a folder of data, by the lower-case stem of their names.
_DESCRIPTIONS = {"readme", "license", "licence", "copying", "notice", "citation", "changelog"}
# Files that `datasets` writes in addition to the data.
_DESCRIPTIONS |= {"dataset_info", "dataset_infos", "dataset_dict", "state"}
_MARKER = re.compile(r"_(SUCCESS|FAILURE|metadata|common_metadata|(started|committed)_(vacuum)?\d+)|.*\.crc", re.DOTALL)
"""Whole names of the files that Spark, Hadoop and Databricks leave beside data: the end of a job, statistics of Parquet files,
the begin and end of a transaction, checksums."""


def known_format(path: Path) -> str | None:
    """Return the format for a file's suffix, without the compression suffix; None for an unknown suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:] if suffix.lower() not in _COMPRESSION_OF_SUFFIX]
    return FORMAT_OF_SUFFIX.get(suffixes[-1]) if suffixes else None


def known_compression(path: Path) -> str | None:
    """Return the compression for a file's suffix; None without one."""
    return _COMPRESSION_OF_SUFFIX.get(path.suffix.lower())


def describes_a_folder(path: Path) -> bool:
    """Return whether a file is no data by its name, such as README.md, LICENSE.txt, dataset_info.json and Spark's _SUCCESS."""
    return path.name.split(".")[0].lower() in _DESCRIPTIONS or bool(_MARKER.fullmatch(path.name))
