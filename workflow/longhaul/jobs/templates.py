"""Renders Jinja templates with shell quoting (sbatch scripts, ds_config.json); the values come from other modules."""

from __future__ import annotations

import json
import shlex

import jinja2

from longhaul.config.shipped_files import data_root
from longhaul.config.site_config import Site
from longhaul.planning import StagePlan
from longhaul.planning.deepspeed_config import deepspeed_sections


def template(name: str) -> jinja2.Template:
    """Return a template of the templates folder; an undefined variable is an error.

    Filters: `sh` quotes a word for the shell, `sh_value` the value of an assignment, `tojson` writes JSON.
    """
    environment = jinja2.Environment(  # nosec B701  # shell and JSON: values are quoted by filters
        loader=jinja2.FileSystemLoader(data_root() / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["sh_value"] = _single_quoted
    environment.filters["tojson"] = json.dumps
    return environment.get_template(name)


def render_deepspeed_config(stage: StagePlan, site: Site) -> str:
    """Return the text of a stage's ds_config.json. It has no total batch size: DeepSpeed derives that."""
    return template("deepspeed/ds_config.json.j2").render(sections=deepspeed_sections(stage, site))


def _single_quoted(value: str) -> str:
    """Quote every value, also those that shlex leaves bare: an unquoted `NAME==value` reads like a comparison."""
    return "'" + value.replace("'", "'\"'\"'") + "'"
