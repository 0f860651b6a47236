"""Two hosts, each with its own mount of one file system whose client caches names for some seconds.

The mounts are FUSE mounts of one folder (bindfs). Their kernel caches keep entries, attributes and the absence of names. That
is a real cache of directories, and a stricter one than that of NFS, which asks its server whenever a folder is opened. The
hosts are UTS namespaces. Each test first makes host B cache what is about to change.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pipeline_run import REPOSITORY

CACHED_S = 5
DEAD_AFTER_S = 3 * CACHED_S  # the owner counts twice a second, and B sees it as late as its cache allows
OPTIONS = ",".join(f"{kind}_timeout={CACHED_S}" for kind in ("entry", "attr", "negative"))

pytestmark = [
    pytest.mark.skipif(not shutil.which("bindfs"), reason="not installed: bindfs (make test-packages)"),
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="FUSE mounts need root"),  # noqa: PTH110
]


class Mounts:
    """The mounts of one folder on the hosts "a" and "b"; `real` is the folder itself."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.real = folder, folder / "real"
        self.real.mkdir()
        for host in "ab":
            (folder / host).mkdir()
            subprocess.run(["bindfs", "-o", OPTIONS, str(self.real), str(folder / host)], check=True)

    def __getitem__(self, host: str) -> Path:
        return self._folder / host

    def start(self, host: str, code: str) -> subprocess.Popen[str]:
        """Start Python on that host; in `code`, `here` is the path of its mount."""
        prologue = f"from pathlib import Path; import sys, time; here = Path({str(self[host])!r})\n"
        words = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh", sys.executable, "-c"]
        return subprocess.Popen(
            [*words, prologue + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY / 'workflow'}:{REPOSITORY}"},
        )

    def run(self, host: str, code: str) -> str:
        process = self.start(host, code)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        return output.strip()

    def unmount(self) -> None:
        for host in "ab":
            subprocess.run(["umount", "--lazy", str(self[host])], check=True)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.unmount()


def cache_absence(mounts: Mounts, name: str) -> Path:
    """Make host B cache that a name is absent; return its path on host B."""
    path = mounts["b"] / name
    assert not path.exists()
    return path


def test_the_mounts_cache_names(mounts: Mounts):
    """Otherwise these tests would show nothing."""
    path = cache_absence(mounts, "late")
    mounts.run("a", "(here / 'late').touch()")
    assert not path.exists() and (mounts["a"] / "late").exists()
    assert [found.name for found in mounts["b"].iterdir()] == ["late"]


FAILURE = "Failure('permanent', 'disk full', 'free space', key='k')"


def test_a_failure_that_another_host_has_just_written_is_found(mounts: Mounts):
    """The supervisor reads what a rank wrote, and the main process what the supervisor wrote."""
    (mounts.real / "stage").mkdir()
    for name in ("stage/failure.json", "stage/failures", "stage/failures/rank-00001.json"):
        cache_absence(mounts, name)
    write = f"""
from longhaul.artifacts.job_state import Failure
{FAILURE}.write(here / "stage/failures/rank-00001.json")
{FAILURE}.write(here / "stage/failure.json")
"""
    read = """
from longhaul.artifacts.job_state import rank_failures, read_failure
assert not (here / "stage/failures").exists(), "the cache has expired: the test shows nothing"
print([found.cause for found in rank_failures(here / "stage")], read_failure(here / "stage").cause)
"""
    reader = mounts.start("b", "sys.stdin.readline()\n" + read)
    mounts.run("a", write)
    cache_absence(mounts, "stage/failures")
    assert reader.communicate("now\n", timeout=60)[0].strip() == "['disk full'] disk full"


def test_a_missing_file_is_not_waited_for(mounts: Mounts):
    look = "from longhaul.artifacts.job_state import read_failure; from time import monotonic as now; since = now()\n"
    assert mounts.run("b", look + "print(read_failure(here / 'stage'), now() - since < 1)") == "None True"


HOLDS = """
from longhaul.artifacts.leases import Lease
from longhaul.train.checkpoint.weights_lock import LeaseClaim, _beat
import threading
claim = LeaseClaim(Lease(here / "lease.json"), here / "lease.beat", dead_after_s={dead_after_s})
while not claim.try_acquire():
    time.sleep(0.1)
threading.Thread(target=_beat, args=(here / "lease.beat", 0.5, threading.Event()), daemon=True).start()
print("holds", flush=True)
sys.stdin.readline()
claim._lease.release()
print("released", flush=True)
"""


def test_a_second_writer_waits_until_the_first_has_ended(mounts: Mounts):
    """B caches that there is no lease. Then it waits while A runs, and follows long before it would treat A as dead."""
    cache_absence(mounts, "lease.json")
    first = mounts.start("a", HOLDS.format(dead_after_s=60))
    assert first.stdout and first.stdin and first.stdout.readline() == "holds\n"
    second = mounts.start("b", HOLDS.format(dead_after_s=DEAD_AFTER_S))
    assert second.stdout and "waiting until it ends" in second.stdout.readline()
    readable, _, _ = select.select([second.stdout], [], [], DEAD_AFTER_S + 3)
    assert not readable, "both write at the same time"
    first.stdin.write("end\n")
    first.stdin.flush()
    assert first.stdout.readline() == "released\n"
    since = time.monotonic()
    assert second.stdout.readline() == "holds\n"
    assert time.monotonic() - since < DEAD_AFTER_S, "it waited until the first counted as dead"
    assert second.communicate("end\n", timeout=60)[0] == "released\n"


def test_the_lease_of_a_dead_owner_on_another_host_is_taken_over(mounts: Mounts):
    first = mounts.start("a", HOLDS.format(dead_after_s=60))
    assert first.stdout and first.stdout.readline() == "holds\n"
    first.kill()
    first.wait()
    second = mounts.start("b", HOLDS.format(dead_after_s=CACHED_S + 1))
    assert "for 6 s; taking over its lease" in second.communicate("end\n", timeout=60)[0]


SAVE = """
import json
from longhaul.artifacts.atomic_files import file_blake3, write_json
from longhaul.train.checkpoint import checkpoint_folders as folders
from tests.support.checkpoint_manifest import manifest_fields
folder = folders.step_folder(here, {step})
partial = folders.partial_folder(folder)
(partial / "reference").mkdir(parents=True)
files = {{}}
for name in ("optim.pt", "reference/tensors.json"):
    (partial / name).write_text("{text}")
    files[name] = {{"bytes": (partial / name).stat().st_size, "blake3": file_blake3(partial / name)}}
write_json(partial / "manifest.json", manifest_fields(files, step={step}))
folders.publish(folder)
"""
FOUND = """
from longhaul.train.checkpoint import checkpoint_folders as folders
import json
found = folders.complete_checkpoints(here)
newest = found[max(found)]
files = json.loads((newest / "manifest.json").read_text())["files"]
print(sorted(found), list(folders.wrong_hashes(newest, files.items())))
"""


def test_the_newest_checkpoint_of_another_host_is_found_complete(mounts: Mounts):
    """B caches that every name in it is absent, as it looked there while the checkpoint was saved."""
    mounts.run("a", SAVE.format(step=3, text="x" * 10))
    assert mounts.run("b", FOUND) == "[3] []"
    for name in ("", "/manifest.json", "/optim.pt", "/reference/tensors.json"):
        cache_absence(mounts, f"checkpoints/step-00000006{name}")
    mounts.run("a", SAVE.format(step=6, text="y" * 20))
    cache_absence(mounts, "checkpoints/step-00000006/reference/tensors.json")
    assert mounts.run("b", FOUND) == "[3, 6] []"


def test_a_step_that_was_saved_twice_does_not_count_as_damaged(mounts: Mounts):
    """This happens after a roll-back. B has read the first save a moment ago."""
    mounts.run("a", SAVE.format(step=3, text="x" * 10))
    assert mounts.run("b", FOUND) == "[3] []"
    mounts.run("a", SAVE.format(step=3, text="longer than the first one"))
    assert mounts.run("b", FOUND) == "[3] []"


PUBLISH = """
from longhaul.data.shards.write_chunk import publish_folder
with publish_folder(here, here / "chunk", "record.json") as written:
    (written / "record.json").write_text({text!r})
    print("written", flush=True)
    sys.stdin.readline()
print("finished")
"""


def test_of_two_hosts_that_write_a_chunk_the_second_discards_its_own(mounts: Mounts):
    """B caches that the chunk is absent."""
    second = mounts.start("b", PUBLISH.format(text="second"))
    assert second.stdout and second.stdout.readline() == "written\n"
    cache_absence(mounts, "chunk")
    mounts.run("a", PUBLISH.format(text="first"))
    cache_absence(mounts, "chunk")
    assert second.communicate("now\n", timeout=60)[0] == "finished\n"
    assert (mounts.real / "chunk/record.json").read_text() == "first"
    assert [path.name for path in mounts.real.iterdir()] == ["chunk"]
