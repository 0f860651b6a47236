"""Puts a payload into torch.save files: instructions that run a command when the file is unpickled without restrictions."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Iterable
from pathlib import Path

from longhaul.artifacts.atomic_files import file_blake3


def put_payload(path: Path, marker: Path) -> None:
    """Let the unpickling of the file make the file `marker` first; everything else of it stays the same."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = [name for name in members if name.endswith("data.pkl")]
    protocol, rest = members[name][:2], members[name][2:]
    assert protocol == b"\x80\x02"
    call = b"cposix\nsystem\n(V" + f"touch {shlex.quote(str(marker))}".encode() + b"\ntR0"  # call, then drop the result
    members[name] = protocol + call + rest
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def put_payload_in_checkpoint(folder: Path, marker: Path) -> list[str]:
    """Put the payload into every .pt file of a checkpoint, with sizes and hashes of the manifest adjusted. Return the files."""
    paths = sorted(folder.rglob("*.pt"))
    for path in paths:
        put_payload(path, marker)
    adjust_manifest(folder, paths)
    return [path.name for path in paths]


def adjust_manifest(folder: Path, paths: Iterable[Path]) -> None:
    """Write the present sizes and hashes of these files into the manifest, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in paths:
        entry = {"bytes": path.stat().st_size, "blake3": file_blake3(path)}
        manifest["files"][str(path.relative_to(folder))] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
