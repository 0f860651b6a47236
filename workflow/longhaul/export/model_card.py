"""Writes the README.md of an export: provenance, verification results, usage."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

import longhaul
from longhaul.artifacts.atomic_files import canonical_json
from longhaul.export.open_verified_checkpoint import VerifiedCheckpoint
from longhaul.export.tokenizer_files import AUTO_TOKENIZER_DIFFERS
from longhaul.jobs.kinds.export_job import ExportSpec

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{%- if base_hub %}
base_model: {{ base_hub }}
{%- endif %}
tags:
- longhaul
---

# {{ p.run }} / {{ p.stage }}

{{ architecture }} with {{ "{:,}".format(parameters) }} parameters in {{ p.dtype }}, trained by longhaul
{%- if base %} from {{ base }}{% else %} from random weights{% endif %}.
{%- for note in p.pretrained_changes %} {{ note }}{% endfor %}
{%- if p.from %} The stage started from the `{{ p.from.checkpoint }}` checkpoint of stage `{{ p.from.stage }}`.{% endif %}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ folder }}")
model = AutoModelForCausalLM.from_pretrained("{{ folder }}", dtype="auto")
```

## Other engines

config.json, the tensors' names and types, and the tokenizer's files are those of the family's official repositories.
Exports of this family were compared, in fp32 and on a CPU, with {{ compared_engines }}.
{%- if not verification.tokenizer.auto_tokenizer_equal %}

**{{ auto_tokenizer_differs }}.**
{%- endif %}

## Provenance

| | |
|---|---|
{%- for name, value in rows %}
| {{ name }} | `{{ value }}` |
{%- endfor %}

## Verification

Each of the {{ verification.tensors.count }} tensors equals, bit for bit, the engine's master weight
{%- if p.dtype == "fp8" %}, cast to bf16 or rounded to
block-scaled FP8: each weight of a decoder layer's matrix is within 1/16 of itself, or 1/1024 of its block's factor.
{%- else %} cast to {{ p.dtype }}.{% endif %}
The logits of {{ verification.logits.prompts }} fixed prompts ({{ verification.logits.tokens }} tokens)
{%- if verification.logits.bit_equal %} equal those of the training engine bit for bit.
{%- else %} differ from those of the training engine by at most {{ "%.3g" % verification.logits.max_abs_difference }};
the limit is {{ "%.3g" % verification.logits.bound }}.
{%- endif %}
"""


COMPARED_ENGINES = "transformers 4.57.6 and 5.23.0, and vLLM 0.32.0"
"""Releases in which tests/serve loads an export of every family."""


def provenance(job: ExportSpec, source: VerifiedCheckpoint) -> dict[str, Any]:
    """Return where an export comes from, for the model card, the artifact and the report. It holds no time and no host."""
    spec = source.checkpoint.spec
    return {
        "run": job.run,
        "stage": job.stage,
        "which": job.which,
        "step": source.step,
        "dtype": job.dtype,
        "kind": spec.get("kind"),
        "dataset": spec.get("dataset"),
        "from": spec.get("from"),
        "model": spec.get("model"),
        "pretrained_changes": list(job.pretrained_changes),
        "checkpoint_sha256": source.manifest_sha256,
        "config_hash": job.config_hash,
        "data_hash": source.checkpoint.data_hash,
        "tokenizer_hash": source.tokenizer.hash,
        "git_commit": git_commit(Path(longhaul.__file__).parent),
        "versions": {"longhaul": longhaul.__version__}
        | {name: version(name) for name in ("torch", "deepspeed", "transformers", "safetensors")},
    }


def model_card(
    facts: dict[str, Any], architecture: str, parameters: int, folder: str, verification: dict[str, Any]
) -> str:
    """Return the text of an export's README.md.

    facts:        what `provenance` returned
    architecture: name of the model's class in transformers
    folder:       path of the export, for the example code
    """
    base, base_hub = _base_model(facts["model"] or {})
    plain = {key: value for key, value in facts.items() if isinstance(value, str | int) and value != ""}
    rows = [*plain.items(), *facts["versions"].items()]
    # Markdown is no HTML; the template is the package's own.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)  # nosec B701
    return environment.from_string(CARD).render(
        p=facts,
        base=base,
        base_hub=base_hub,
        architecture=architecture,
        parameters=parameters,
        folder=folder,
        compared_engines=COMPARED_ENGINES,
        auto_tokenizer_differs=AUTO_TOKENIZER_DIFFERS,
        verification=verification,
        rows=[(name.replace("_", " "), value) for name, value in rows],
    )


def _base_model(model: dict[str, Any]) -> tuple[str, str]:
    """Return a description of the pretrained weights and their hub id; both are empty when training began with random weights."""
    if hub := model.get("hub"):
        return f"{hub['id']} at {hub['revision']}", hub["id"]
    if "path" in model and "files" in model:
        return f"the pretrained folder {Path(model['path']).name} ({canonical_json(model['files'])})", ""
    return "", ""


def git_commit(folder: Path) -> str:
    """Return the commit of the git checkout that has `folder`, with `-dirty` when files were edited; "" without a checkout.

    A package that is installed below somebody's own repository is not part of it.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", ".")
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
