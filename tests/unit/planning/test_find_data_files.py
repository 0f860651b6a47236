"""Files that a path, a folder or a glob names."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from longhaul.data.readers.first_rows import first_rows
from longhaul.errors import UserError
from longhaul.planning import find_data_files as module
from longhaul.planning.find_data_files import check_format, find_files
from tests.support.small_configs import plan_of

KEY = "datasets.web.files"


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def refusal(folder: Path, pattern: str) -> tuple[str, str]:
    """Return message and remedy of the error for a pattern; FOLDER stands for `folder`."""
    with pytest.raises(UserError) as refused:
        found(folder, pattern)
    return refused.value.message.replace(str(folder), "FOLDER"), refused.value.hint


def found(folder: Path, pattern: str, file_format: str = "auto") -> list[str]:
    files = find_files(KEY, folder / pattern if pattern else folder, file_format).files
    return [str(path.relative_to(folder)) for path in files]


def test_a_folder_has_no_readme_no_license_and_nothing_hidden(tmp_path: Path):
    write(tmp_path, "README.md", "a/LICENSE.txt", "dataset_info.json", "b/.part.jsonl", ".git/3.jsonl")
    write(tmp_path, "a/1.jsonl", "b/2.jsonl.gz")
    files = find_files(KEY, tmp_path, "auto")
    assert [path.name for path in files.files] == ["1.jsonl", "2.jsonl.gz"]
    assert [path.name for path in files.left_out] == ["README.md", "LICENSE.txt", "dataset_info.json"]


MARKERS = ["_SUCCESS", "_common_metadata", "_metadata", "_committed_6841", "_started_6841", "part-0.parquet.crc"]
"""Files that Spark, Hadoop and Databricks leave beside the data of a job."""


def test_a_folder_has_no_markers_of_spark_and_hadoop(tmp_path: Path):
    write(
        tmp_path,
        *MARKERS,
        "day=1/_SUCCESS",
        "._SUCCESS.crc",
        "._part-0.parquet",
        ".part-0.parquet.crc",
        "_committed_vacuum77",
    )
    write(tmp_path, "part-0.parquet", "day=1/part-1.parquet")
    files = find_files(KEY, tmp_path, "auto")
    assert sorted(path.name for path in files.files) == ["part-0.parquet", "part-1.parquet"]
    assert sorted({path.name for path in files.left_out}) == sorted([*MARKERS, "_committed_vacuum77"])
    assert found(tmp_path, "", "parquet") == ["day=1/part-1.parquet", "part-0.parquet"]


@pytest.mark.parametrize("pattern", ["", "**/*.parquet"])
def test_output_of_a_job_that_has_not_ended_is_refused(tmp_path: Path, pattern: str):
    """Its rows may be there twice, as a failed task wrote them, too. Without the folder, the data are read."""
    write(tmp_path, "part-0.parquet", "_temporary/0/task_7/part-0.parquet")
    message, remedy = refusal(tmp_path, pattern)
    assert message == f"{KEY}: FOLDER/_temporary is left of a job of Spark or Hadoop that has not ended, or that failed"
    assert remedy.startswith("wait for its end, or remove the folder")
    shutil.rmtree(tmp_path / "_temporary")
    assert found(tmp_path, pattern) == ["part-0.parquet"]


@pytest.mark.parametrize(
    "name",
    ["_SUCCESS.txt", "_metadata.json", "_started_part", "_delta_log/0.json", "_part-1", "part-1.crcs", "success"],
)
def test_a_file_that_may_hold_data_is_no_marker(tmp_path: Path, name: str):
    write(tmp_path, "part-0.parquet", name)
    assert "holds files of several formats" in refusal(tmp_path, "")[0]


def test_a_suffix_is_known_in_upper_case_and_a_foreign_one_is_refused_in_the_plan(tmp_path: Path):
    write(tmp_path, "upper/A.JSONL", "upper/B.Jsonl.GZ", "rows.tsv")
    assert found(tmp_path, "upper") == ["upper/A.JSONL", "upper/B.Jsonl.GZ"]
    check_format(KEY, tmp_path / "upper/A.JSONL", "auto")
    with pytest.raises(
        UserError, match=r"rows.tsv: unknown file suffix\n  remedy: set `format`, or use one of .*\.csv"
    ):
        check_format(KEY, tmp_path / "rows.tsv", "auto")
    (tmp_path / "A.JSONL").write_text('{"text": "a"}\n')
    changes = {"datasets.prose.python_stdlib": ..., "datasets.prose.files": ["A.JSONL"]}
    assert first_rows(plan_of(tmp_path, changes), "prose").unread_columns == []
    with pytest.raises(UserError, match=r"rows.tsv: unknown file suffix"):
        plan_of(tmp_path, {**changes, "datasets.prose.files": ["rows.tsv"]})


def test_a_readme_that_is_named_itself_is_read(tmp_path: Path):
    write(tmp_path, "README.md", "notes.md")
    assert found(tmp_path, "README.md") == ["README.md"]
    assert found(tmp_path, "*.md") == ["README.md", "notes.md"]


def test_a_folder_has_one_format_unless_the_format_is_set(tmp_path: Path):
    write(tmp_path, "1.jsonl", "2.jsonl", "3.txt", "4.sha256")
    assert refusal(tmp_path, "") == (
        f"{KEY}: FOLDER holds files of several formats: 2 of jsonl, 1 of text, 1 of unknown format; "
        "for example 1.jsonl and 3.txt",
        "name the files with a glob such as folder/**/*.jsonl, or set `format` to read all of them in one way",
    )
    assert found(tmp_path, "", "text") == ["1.jsonl", "2.jsonl", "3.txt", "4.sha256"]
    assert found(tmp_path, "**/*.jsonl") == ["1.jsonl", "2.jsonl"]


def test_the_example_of_another_format_differs_from_the_first_file(tmp_path: Path):
    write(tmp_path, "1.jsonl", "2.txt", "3.txt")
    assert refusal(tmp_path, "")[0].endswith("1 of jsonl, 2 of text; for example 1.jsonl and 2.txt")


@pytest.mark.parametrize("pattern", ["data", "data/**/*.jsonl", "data/**", "*/**/**/*.jsonl"])
def test_linked_folders_are_followed(tmp_path: Path, pattern: str):
    write(tmp_path, "store/x/1.jsonl", "data/2.jsonl")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    names = ["data/2.jsonl", "data/linked/x/1.jsonl"]
    assert found(tmp_path, pattern) == names + (["store/x/1.jsonl"] if pattern.startswith("*") else [])


@pytest.mark.parametrize("pattern", ["data", "data/**/*.jsonl"])
def test_a_loop_of_links_is_refused_until_it_is_removed(tmp_path: Path, pattern: str):
    write(tmp_path, "data/a/1.jsonl")
    (tmp_path / "data" / "a" / "back").symlink_to(tmp_path / "data")
    assert refusal(tmp_path, pattern) == (
        f"{KEY}: FOLDER/data/a/back is a link to a folder above it",
        "remove the link, or name other folders",
    )
    assert found(tmp_path, "data/a/1.jsonl") == ["data/a/1.jsonl"]
    (tmp_path / "data" / "a" / "back").unlink()
    assert found(tmp_path, pattern) == ["data/a/1.jsonl"]


BAD_ENTRIES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "broken link": (
        lambda path: path.symlink_to("nowhere"),
        "is a broken link",
        "remove the link, or restore its target",
    ),
    "pipe": (os.mkfifo, "is a pipe or a device, not a file", "remove it from the folder"),
}


@pytest.mark.parametrize(("make", "message", "remedy"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
@pytest.mark.parametrize("pattern", ["data", "data/*.jsonl", "data/**/*.jsonl"])
def test_what_is_no_file_is_refused_until_it_is_removed(
    tmp_path: Path, make: Callable[[Path], None], message: str, remedy: str, pattern: str
):
    write(tmp_path, "data/1.jsonl")
    make(tmp_path / "data" / "2.jsonl")
    assert refusal(tmp_path, pattern) == (f"{KEY}: FOLDER/data/2.jsonl {message}", remedy)
    (tmp_path / "data" / "2.jsonl").unlink()
    assert found(tmp_path, pattern) == ["data/1.jsonl"]


def test_a_pipe_that_is_named_itself_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "1.jsonl")
    message = f"{KEY}: FOLDER/1.jsonl is a pipe or a device, not a file"
    assert refusal(tmp_path, "1.jsonl") == (message, "name a file, or a folder of files")
    write(tmp_path, "data/1.jsonl")
    assert found(tmp_path, "data/1.jsonl") == found(tmp_path, "data") == ["data/1.jsonl"]


def test_a_folder_that_cannot_be_read_is_refused_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "data/1.jsonl")
    refused = PermissionError(errno.EACCES, "Permission denied", "data")  # root reads every folder

    def refuse(_path: Path) -> None:
        raise refused

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "scandir", refuse)
        assert refusal(tmp_path, "data") == (
            f"{KEY}: cannot read data: Permission denied",
            "make it readable, or name other files",
        )
        assert found(tmp_path, "data/1.jsonl") == ["data/1.jsonl"]
    assert found(tmp_path, "data") == ["data/1.jsonl"]


@pytest.mark.parametrize("pattern", ["/", "/**/*.txt", "~", "~/**"])
def test_the_whole_disk_and_the_home_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path if pattern.startswith("~") else Path("/")
    with pytest.raises(UserError) as refused:
        find_files(KEY, Path(pattern).expanduser(), "auto")
    assert refused.value.message == f"{KEY}: {folder} is no folder of data alone"
    assert refused.value.hint == "name a folder that holds only data"


def test_two_stars_must_be_a_whole_name(tmp_path: Path):
    assert refusal(tmp_path, "a**b") == (
        f"{KEY}: 'a**b' contains **, which must be a folder's whole name",
        "write ** between slashes",
    )


def test_a_folder_with_too_many_entries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MAX_ENTRIES", 3)
    write(tmp_path, *(f"{number}.txt" for number in range(3)))
    assert len(found(tmp_path, "")) == 3
    write(tmp_path, ".hidden")
    assert refusal(tmp_path, "") == (f"{KEY}: FOLDER has more than 3 entries", "name a smaller folder")
    write(tmp_path, "small/1.txt")
    assert found(tmp_path, "small") == ["small/1.txt"]


@pytest.mark.parametrize("pattern", ["no.txt", "no/*.txt", "1.txt/*.txt", "no/**/*.txt"])
def test_what_does_not_exist_has_no_files(tmp_path: Path, pattern: str):
    write(tmp_path, "1.txt")
    assert found(tmp_path, pattern) == []


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a/b/1.txt", "**/1.txt", True),
        ("1.txt", "**/1.txt", True),
        ("a/b/1.txt", "a/**/b/*.txt", True),
        ("a/c/b/1.txt", "a/**/b/?.txt", True),
        ("a/1.txt", "a/**/b/*.txt", False),
        ("a/b/1.txt", "**/[!1].txt", False),
        ("a/b/1.txt", "*/1.txt", False),
        ("a", "a/*.txt", False),
        ("a/1.txt", "a", False),
        ("a/1.txt", "a/**/**/1.txt", True),
        ("a/b", "**/a", False),
    ],
)
def test_globs_match_whole_names(path: str, pattern: str, expected: bool):
    assert module._is_match(Path(path).parts, Path(pattern).parts) is expected
