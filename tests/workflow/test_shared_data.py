"""Several jobs per dataset: what is started, and that their number is no cause to start anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.chain import Chain, job_counts, tiny_config

MANIFEST = "results/tiny/data/prose.json"


def started(chain: Chain) -> dict[str, int]:
    """Jobs that make the manifest, those of the tokenizer aside."""
    counts = job_counts(chain.run("-n", MANIFEST))
    return {rule: count for rule, count in counts.items() if rule != "tokenizer"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("shared"), tiny_config(data_jobs={"prose": 3}))
    chain.config["datasets"]["prose"]["chunk_mb"] = 0.005
    chain.save()
    return chain


def with_jobs(chain: Chain, jobs: int) -> Chain:
    chain.config["data_jobs"] = {"prose": jobs}
    chain.save()
    return chain


def test_the_chain_has_as_many_jobs_as_are_asked_for(chain: Chain):
    assert started(chain) == {"survey": 1, "encode": 3, "tokenize": 1}
    assert started(with_jobs(chain, 1)) == {"tokenize": 1}
    assert started(with_jobs(chain, 2)) == {"survey": 1, "encode": 2, "tokenize": 1}


def test_their_number_is_no_cause(chain: Chain):
    """Neither for data that are finished nor, half-way, for units that are there."""
    with_jobs(chain, 2).run("results/tiny/data/prose.encoded-1-of-2.json")
    units = {path: path.stat().st_mtime_ns for path in chain.results.glob("data/prose/*/record.json")}
    assert len(units) >= 2
    with_jobs(chain, 3).run(MANIFEST)
    after = {path: path.stat().st_mtime_ns for path in chain.results.glob("data/prose/*/record.json")}
    assert after.items() > units.items()
    assert [path.name for path in Path(chain.results / "data").glob("prose.*-3.json")] == []
    for jobs in (3, 1, 2):
        assert started(with_jobs(chain, jobs)) == {}
    source = chain.folder / "prose.jsonl"
    source.write_text(source.read_text().replace("home", "road"))
    assert started(chain) == {"survey": 1, "encode": 2, "tokenize": 1}
