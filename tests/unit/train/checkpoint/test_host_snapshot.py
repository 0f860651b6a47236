"""Copies of a save's tensors: their values stay while training changes the originals."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from longhaul.errors import UserError
from longhaul.train.checkpoint.host_snapshot import HostMemory, Snapshot

FILE = Path("states.pt")


@pytest.fixture
def memory() -> HostMemory:
    return HostMemory(torch.device("cpu"))


def test_a_copy_does_not_follow_its_source(memory: HostMemory):
    source = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    (copied,) = memory.copy([source])
    source.zero_()
    assert copied.tolist() == [[0, 1, 2], [3, 4, 5]] and copied.dtype == torch.bfloat16


def test_every_copy_has_a_storage_of_its_size(memory: HostMemory):
    """torch.save writes whole storages."""
    sources = [torch.ones(3), torch.tensor(7), torch.ones(4, 4)[:, 1], torch.empty(0), torch.tensor([True])]
    copies = memory.copy(sources)
    assert [copied.untyped_storage().nbytes() for copied in copies] == [source.nbytes for source in sources]
    for copied, source in zip(copies, sources, strict=True):
        assert torch.equal(copied, source) and copied.dtype == source.dtype and copied.is_contiguous()


def test_memory_is_reserved_once(memory: HostMemory):
    memory.reserve(1000)
    first = [memory.copy([torch.full((9,), value)])[0].data_ptr() for value in (1.0, 2.0)]
    assert first[0] == first[1]
    assert memory.copy([torch.ones(2000)])[0].sum() == 2000


def test_too_little_memory_is_an_error_with_a_remedy(memory: HostMemory, monkeypatch: pytest.MonkeyPatch):
    def refuse(size: int, *_: object) -> np.ndarray:
        if size:
            raise MemoryError
        return np.zeros(0, np.uint8)

    source = torch.ones(1000)
    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(UserError, match=r"needs 0.0 GB of CPU memory") as raised:
        memory.copy([source])
    assert "node.memory_mb" in raised.value.hint


def test_it_knows_which_bytes_it_holds(memory: HostMemory):
    (copied,) = memory.copy([torch.ones(8)])
    assert memory.holds(memoryview(copied.numpy()).cast("B"))
    assert not memory.holds(memoryview(bytes(32)))


def test_a_snapshot_keeps_what_training_changes(memory: HostMemory):
    state = {"step": torch.tensor(3.0), "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "scaler": {"scale": 4}}
    snapshot = Snapshot(memory)
    snapshot.add(FILE, state)
    state["groups"][0]["lr"] = 0.5
    state["scaler"]["scale"] = 2
    ((path, saved),) = snapshot.copy()
    state["step"].add_(1)
    assert path == FILE
    assert saved == {"step": 3.0, "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "scaler": {"scale": 4}}


def test_tied_weights_are_copied_once(memory: HostMemory):
    weight = torch.ones(4, 2)
    snapshot = Snapshot(memory)
    snapshot.add(FILE, {"embedding": weight, "head": weight, "row": weight[0]})
    assert snapshot.bytes == 128  # 32 bytes of the weight and 8 of the row, each rounded up to 64
    ((_, saved),) = snapshot.copy()
    assert saved["embedding"].data_ptr() == saved["head"].data_ptr() != saved["row"].data_ptr()


def test_a_state_dict_keeps_its_class_and_metadata(memory: HostMemory):
    state = torch.nn.Linear(2, 2).state_dict()
    snapshot = Snapshot(memory)
    snapshot.add(FILE, {"module": state})
    ((_, saved),) = snapshot.copy()
    assert type(saved["module"]) is OrderedDict and saved["module"]._metadata == state._metadata
    assert list(saved["module"]) == ["weight", "bias"]
