"""Two hosts with views of their own of one file system, each of which remembers names for some seconds.

The views are FUSE mounts of one folder (bindfs) whose kernel caches keep entries, attributes and the absence of names: a real
cache of directories, and a stricter one than NFS, which asks its server whenever a folder is opened. The hosts are UTS
namespaces; each test first makes host B remember what is about to change.
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

from tests.support.chain import REPOSITORY

REMEMBERED_S = 5
DEAD_AFTER_S = 3 * REMEMBERED_S  # the holder counts twice a second, and is seen as late as a view remembers
OPTIONS = ",".join(f"{kind}_timeout={REMEMBERED_S}" for kind in ("entry", "attr", "negative"))

pytestmark = [
    pytest.mark.skipif(not shutil.which("bindfs"), reason="not installed: bindfs (make test-packages)"),
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="FUSE mounts need root"),  # noqa: PTH110
]


class Views:
    """One folder as the hosts "a" and "b" see it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.real = folder, folder / "real"
        self.real.mkdir()
        for host in "ab":
            (folder / host).mkdir()
            subprocess.run(["bindfs", "-o", OPTIONS, str(self.real), str(folder / host)], check=True)

    def __getitem__(self, host: str) -> Path:
        return self._folder / host

    def start(self, host: str, code: str) -> subprocess.Popen[str]:
        """Python on that host, in its view; `code` knows Path as `here`."""
        begin = f"from pathlib import Path; import sys, time; here = Path({str(self[host])!r})\n"
        words = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh", sys.executable, "-c"]
        return subprocess.Popen(
            [*words, begin + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "workflow")},
        )

    def run(self, host: str, code: str) -> str:
        process = self.start(host, code)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        return said.strip()

    def unmount(self) -> None:
        for host in "ab":
            subprocess.run(["umount", "--lazy", str(self[host])], check=True)


@pytest.fixture
def views(tmp_path: Path) -> Iterator[Views]:
    views = Views(tmp_path)
    yield views
    views.unmount()


def remembers_its_absence(views: Views, name: str) -> Path:
    """The name in host B's view, which is not there, and of which B knows that."""
    path = views["b"] / name
    assert not path.exists()
    return path


def test_the_views_do_remember(views: Views):
    """Else these tests would show nothing."""
    path = remembers_its_absence(views, "late")
    views.run("a", "(here / 'late').touch()")
    assert not path.exists() and (views["a"] / "late").exists()
    assert [found.name for found in views["b"].iterdir()] == ["late"]


FAILURE = "Failure('permanent', 'disk full', 'free space', key='k')"


def test_a_reason_is_seen_that_another_host_has_just_written(views: Views):
    """By the supervisor of what a rank says, and by the main process of what the supervisor concludes."""
    (views.real / "stage").mkdir()
    for name in ("stage/failure.json", "stage/failures", "stage/failures/rank-00001.json"):
        remembers_its_absence(views, name)
    write = f"""
from longhaul.artifacts.job_state import Failure
{FAILURE}.write(here / "stage/failures/rank-00001.json")
{FAILURE}.write(here / "stage/failure.json")
"""
    read = """
from longhaul.artifacts.job_state import rank_failures, read_failure
assert not (here / "stage/failures").exists(), "nothing is remembered: too late to show anything"
print([found.cause for found in rank_failures(here / "stage")], read_failure(here / "stage").cause)
"""
    reader = views.start("b", "sys.stdin.readline()\n" + read)
    views.run("a", write)
    remembers_its_absence(views, "stage/failures")
    assert reader.communicate("now\n", timeout=60)[0].strip() == "['disk full'] disk full"


def test_what_is_not_there_is_not_waited_for(views: Views):
    look = "from longhaul.artifacts.job_state import read_failure; from time import monotonic as now; since = now()\n"
    assert views.run("b", look + "print(read_failure(here / 'stage'), now() - since < 1)") == "None True"


HOLDS = """
from longhaul.artifacts.leases import Lease
from longhaul.train.checkpoint.weights_lock import _beat, Claim
import threading
claim = Claim(Lease(here / "lease.json"), here / "lease.beat", dead_after_s={dead_after_s})
while not claim.succeeds():
    time.sleep(0.1)
threading.Thread(target=_beat, args=(here / "lease.beat", 0.5, threading.Event()), daemon=True).start()
print("holds", flush=True)
sys.stdin.readline()
claim._lease.release()
print("released", flush=True)
"""


def test_one_writer_at_a_time_and_the_next_one_when_it_has_ended(views: Views):
    """B has looked before A came; then it waits, however long A works, and follows long before it would take A for dead."""
    remembers_its_absence(views, "lease.json")
    first = views.start("a", HOLDS.format(dead_after_s=60))
    assert first.stdout and first.stdin and first.stdout.readline() == "holds\n"
    second = views.start("b", HOLDS.format(dead_after_s=DEAD_AFTER_S))
    assert second.stdout and "works on" in second.stdout.readline()
    begins, _, _ = select.select([second.stdout], [], [], DEAD_AFTER_S + 3)
    assert not begins, "it began beside the first"
    first.stdin.write("end\n")
    first.stdin.flush()
    assert first.stdout.readline() == "released\n"
    since = time.monotonic()
    assert second.stdout.readline() == "holds\n"
    assert time.monotonic() - since < DEAD_AFTER_S, "it waited for the dead"
    assert second.communicate("end\n", timeout=60)[0] == "released\n"


def test_a_holder_that_died_on_another_host_is_followed(views: Views):
    first = views.start("a", HOLDS.format(dead_after_s=60))
    assert first.stdout and first.stdout.readline() == "holds\n"
    first.kill()
    first.wait()
    second = views.start("b", HOLDS.format(dead_after_s=REMEMBERED_S + 1))
    assert "has not been heard of for 6 s; taking over" in second.communicate("end\n", timeout=60)[0]


SAVE = """
import json
from longhaul.artifacts.files import file_sha256, write_json
from longhaul.train.checkpoint import folders as store
folder = store.step_folder(here, {step})
partial = store.partial_folder(folder)
(partial / "proof").mkdir(parents=True)
files = {{}}
for name in ("optim.pt", "proof/tensors.json"):
    (partial / name).write_text("{text}")
    files[name] = {{"bytes": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)}}
write_json(partial / "manifest.json", {{"files": files}})
store.publish(folder)
"""
FOUND = """
from longhaul.train.checkpoint import folders as store
import json
found = store.complete_checkpoints(here)
newest = found[max(found)]
files = json.loads((newest / "manifest.json").read_text())["files"]
print(sorted(found), list(store.wrong_hashes(newest, files.items())))
"""


def test_the_newest_checkpoint_of_another_host_is_found_whole(views: Views):
    """Every name in it is one that B remembers as absent, as it looked while the checkpoint was saved."""
    views.run("a", SAVE.format(step=3, text="x" * 10))
    assert views.run("b", FOUND) == "[3] []"
    for name in ("", "/manifest.json", "/optim.pt", "/proof/tensors.json"):
        remembers_its_absence(views, f"checkpoints/step-00000006{name}")
    views.run("a", SAVE.format(step=6, text="y" * 20))
    remembers_its_absence(views, "checkpoints/step-00000006/proof/tensors.json")
    assert views.run("b", FOUND) == "[3, 6] []"


def test_a_step_that_was_saved_again_is_no_damaged_one(views: Views):
    """After a roll-back: B has read the first save a moment ago."""
    views.run("a", SAVE.format(step=3, text="x" * 10))
    assert views.run("b", FOUND) == "[3] []"
    views.run("a", SAVE.format(step=3, text="longer than the first one"))
    assert views.run("b", FOUND) == "[3] []"


PUBLISH = """
from longhaul.data.shards.write_chunk import published
with published(here, here / "unit", "record.json") as made:
    (made / "record.json").write_text({text!r})
    print("made", flush=True)
    sys.stdin.readline()
print("well")
"""


def test_of_two_hosts_that_make_a_unit_the_second_throws_its_own_away(views: Views):
    """B remembers from before that it is not there."""
    second = views.start("b", PUBLISH.format(text="second"))
    assert second.stdout and second.stdout.readline() == "made\n"
    remembers_its_absence(views, "unit")
    views.run("a", PUBLISH.format(text="first"))
    remembers_its_absence(views, "unit")
    assert second.communicate("now\n", timeout=60)[0] == "well\n"
    assert (views.real / "unit/record.json").read_text() == "first"
    assert [path.name for path in views.real.iterdir()] == ["unit"]
