"""Several jobs per dataset: which jobs are started, and that another number of jobs starts none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pipeline_run import PipelineRun, job_counts, tiny_config

MANIFEST = "results/tiny/data/prose.json"


def started(chain: PipelineRun) -> dict[str, int]:
    """Return the jobs by rule that a dry run of the manifest would start, without the tokenizer job."""
    counts = job_counts(chain.dry_run(MANIFEST))
    return {rule: count for rule, count in counts.items() if rule != "tokenizer"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> PipelineRun:
    chain = PipelineRun(tmp_path_factory.mktemp("shared"), tiny_config(data_jobs={"prose": 3}))
    chain.config["datasets"]["prose"]["chunk_mb"] = 0.005
    chain.save()
    return chain


def with_jobs(chain: PipelineRun, jobs: int) -> PipelineRun:
    chain.config["data_jobs"] = {"prose": jobs}
    chain.save()
    return chain


def test_the_workflow_has_as_many_encode_jobs_as_data_jobs_sets(chain: PipelineRun):
    assert started(chain) == {"index_sources": 1, "encode": 3, "tokenize": 1}
    assert started(with_jobs(chain, 1)) == {"tokenize": 1}
    assert started(with_jobs(chain, 2)) == {"index_sources": 1, "encode": 2, "tokenize": 1}


def test_another_number_of_jobs_triggers_no_rerun(chain: PipelineRun):
    """Neither a finished manifest nor existing chunks of an unfinished dataset are written again."""
    with_jobs(chain, 2).run("results/tiny/data/prose.encoded-1-of-2.json")
    chunks = {path: path.stat().st_mtime_ns for path in chain.results.glob("data/prose/*/record.json")}
    assert len(chunks) >= 2
    with_jobs(chain, 3).run(MANIFEST)
    after = {path: path.stat().st_mtime_ns for path in chain.results.glob("data/prose/*/record.json")}
    assert after.items() > chunks.items()
    assert [path.name for path in Path(chain.results / "data").glob("prose.*-3.json")] == []
    for jobs in (3, 1, 2):
        assert started(with_jobs(chain, jobs)) == {}
    source = chain.folder / "prose.jsonl"
    source.write_text(source.read_text().replace("home", "road"))
    assert started(chain) == {"index_sources": 1, "encode": 2, "tokenize": 1}
