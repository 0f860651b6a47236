"""The image or environment of the site file is looked for before a job waits in the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longhaul.config.init_files import names_in
from longhaul.config.load_config import SITES, load_site
from longhaul.config.site_config import Site
from longhaul.errors import UserError
from longhaul.scheduling.find_software import compare_software, missing_software, require_software
from tests.support.small_configs import LOCAL, SITE, changed


def site(software: dict[str, Any], **changes: Any) -> Site:
    return Site.model_validate(changed(SITE, {**changes, "software": software}), strict=False)


@pytest.mark.parametrize(
    ("software", "name"),
    [
        ({"kind": "container", "path": "{}/job.sif"}, "job.sif"),
        ({"kind": "venv", "path": "{}/venv"}, "venv/bin/python"),
        ({"kind": "conda", "path": "{}/conda"}, "conda/bin/python"),
        ({"kind": "srun", "options": ["--environment={}/job.toml"]}, "job.toml"),
        ({"kind": "srun", "options": ["--container-image={}/job.sqsh"]}, "job.sqsh"),
    ],
)
def test_path_of_each_kind_is_missing_until_it_exists(software: dict[str, Any], name: str, tmp_path: Path):
    def filled(value: Any) -> Any:
        return [filled(word) for word in value] if isinstance(value, list) else value.replace("{}", str(tmp_path))

    found = site({key: filled(value) for key, value in software.items()})
    file = tmp_path / name
    assert missing_software(found) == [str(file)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert missing_software(found) == [] and compare_software(found) == []


@pytest.mark.parametrize(
    "software",
    [{}, {"kind": "modules", "modules": ["a"]}, {"kind": "srun", "options": ["--container-image=nvcr.io#a:1"]}],
)
def test_software_without_a_file_is_not_looked_for(software: dict[str, Any]):
    assert missing_software(site(software)) == []


def test_placeholders_of_every_shipped_site_are_refused(tmp_path: Path):
    placeholders = 0
    for name in names_in(SITES):
        shipped = load_site(name, tmp_path)
        if not missing_software(shipped):
            continue
        placeholders += 1
        with pytest.raises(UserError, match="is the placeholder of a shipped site file"):
            require_software(shipped)
        assert all(line.problem.startswith("write the path of your") for line in compare_software(shipped))
    assert placeholders >= 8


def test_missing_path_is_refused_on_this_machine_until_it_is_right_and_is_a_warning_on_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    software = {"kind": "container", "path": "/images/none.sif"}
    with pytest.raises(UserError, match=r"/images/none\.sif does not exist"):
        require_software(site(software, **LOCAL))
    image = tmp_path / "job.sif"
    image.touch()
    require_software(site({**software, "path": str(image)}, **LOCAL))
    assert not capsys.readouterr().err
    require_software(site(software))
    assert "/images/none.sif does not exist on this machine" in capsys.readouterr().err
    (line,) = compare_software(site(software))
    assert line.found == "not on this machine" and not line.problem
