"""A run of the whole pipeline that is started on the test cluster's login node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.pipeline_run import PipelineRun, write_site
from tests.support.virtual_cluster import VirtualCluster

HERE = Path(__file__).parent
SITE: dict[str, Any] = yaml.safe_load((HERE / "cluster_site.yaml").read_text())


class PipelineRunOnCluster(PipelineRun):
    """A run whose main Snakemake process is on the login node. `site` changes keys of the site file."""

    def __init__(self, folder: Path, config: dict[str, Any], cluster: VirtualCluster, **site: Any) -> None:
        super().__init__(folder, config, "slurm")
        self.cluster = cluster
        write_site(folder, {**SITE, **site})

    def command(self, *arguments: str) -> list[str]:
        python, _, _, *options = super().command(*arguments)
        return self.cluster.command([python, str(HERE / "fast_snakemake.py"), *options], cwd=self.folder)

    def environment(self) -> dict[str, str]:
        with_fake_apptainer = {"PATH": f"{HERE}:{VirtualCluster.environment()['PATH']}"}
        return {**super().environment(), **VirtualCluster.environment(), **with_fake_apptainer}


def fake_image(folder: Path) -> Path:
    """Write an image as tests/support/apptainer reads it: the path of the Python in the container."""
    image = folder / "job.sif"
    image.write_text(sys.executable)
    return image
