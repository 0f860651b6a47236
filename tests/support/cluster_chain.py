"""The tiny chain, started on the cluster's login node as a user would."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.chain import Chain, write_site
from tests.support.virtual_cluster import VirtualCluster

HERE = Path(__file__).parent
SITE: dict[str, Any] = yaml.safe_load((HERE / "cluster_site.yaml").read_text())


class ClusterChain(Chain):
    """A chain whose Snakemake runs on the login node; `site` changes the site file."""

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
    """What tests/support/apptainer takes for an image: the path of the Python in it."""
    image = folder / "job.sif"
    image.write_text(sys.executable)
    return image
