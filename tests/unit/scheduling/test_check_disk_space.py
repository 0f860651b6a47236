"""The check for free space writes as much as it promises, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from longhaul.errors import DiskFull, UserError
from longhaul.scheduling import check_disk_space as disk_space
from longhaul.scheduling.check_disk_space import RECORDS_BYTES, _print_full_disk, require_free_space


def test_probe_writes_a_mebibyte_that_no_compression_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[bytes] = []

    def fsync(handle: int) -> None:
        (probe,) = tmp_path.iterdir()
        assert os.fstat(handle).st_ino == probe.stat().st_ino, "the probe itself reaches the disk"
        written.append(probe.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    require_free_space(tmp_path)
    assert [len(content) for content in written] == [RECORDS_BYTES] == [1 << 20]
    assert len(set(written[0][i : i + 8] for i in range(0, 8000, 8))) == 1000, "random bytes"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("full_disk")
def test_exhausted_quota_is_reported_with_folder_and_size(tmp_path: Path):
    with pytest.raises(DiskFull, match=f"needs {RECORDS_BYTES} bytes .* of free space in {tmp_path}") as raised:
        require_free_space(tmp_path)
    assert "raise the quota" in raised.value.hint and raised.value.needed_bytes == RECORDS_BYTES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("full_disk")
def test_full_disk_is_printed_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _print_full_disk(tmp_path)
    assert "error: log files may be empty or incomplete" in capsys.readouterr().err


def test_another_error_of_the_probe_is_reported_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk_space.os, "fsync", fsync)
    with pytest.raises(UserError, match=f"cannot write 1048576 bytes to {tmp_path}: Input/output error\n  remedy: let"):
        require_free_space(tmp_path)


@pytest.mark.usefixtures("full_disk")
def test_full_disk_is_reported_with_free_bytes_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    with pytest.raises(DiskFull) as raised:
        require_free_space(Path())
    assert raised.value.message == (
        f"writing the run's records needs 1048576 bytes (0.00 GiB) of free space in {tmp_path}, where 1073741824 bytes "
        "(1.00 GiB) are free"
    )
    assert (raised.value.folder, raised.value.free_bytes) == (tmp_path, 2**30)


@pytest.mark.usefixtures("full_disk")
def test_message_at_exit_names_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _print_full_disk(tmp_path)
    output = capsys.readouterr()
    assert output.err.startswith(
        "error: log files may be empty or incomplete: writing the run's records needs 1048576 bytes"
    )
    assert output.out == ""


def test_check_at_exit_is_registered_with_the_absolute_folder_and_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(disk_space.atexit, "register", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(disk_space.atexit, "unregister", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    disk_space.print_full_disk_at_exit(Path("results"))
    disk_space.cancel_print_at_exit()
    assert calls == [(_print_full_disk, tmp_path / "results"), (_print_full_disk,)]


def test_a_disk_with_space_prints_nothing_and_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _print_full_disk(tmp_path)
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_probes_of_two_processes_have_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: names.extend(path.name for path in tmp_path.iterdir()))
    require_free_space(tmp_path)
    assert names == [f".disk-space-probe.{os.getpid()}"]
