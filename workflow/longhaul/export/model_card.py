"""The export's README.md and what it was made of."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

import longhaul
from longhaul.artifacts.files import canonical_json
from longhaul.export.source_checkpoint import Source
from longhaul.jobs.specs import ExportSpec

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
{%- for note in p.first_weights %} {{ note }}{% endfor %}
{%- if p.from %} The stage started from the `{{ p.from.checkpoint }}` checkpoint of stage `{{ p.from.stage }}`.{% endif %}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ folder }}")
model = AutoModelForCausalLM.from_pretrained("{{ folder }}", dtype="auto")
```

## Provenance

| | |
|---|---|
{%- for name, value in rows %}
| {{ name }} | `{{ value }}` |
{%- endfor %}

## Proof

Each of the {{ proof.tensors.count }} tensors equals, bit for bit, the master weight gathered from the training engine after
the cast to {{ p.dtype }}.
The logits of {{ proof.logits.prompts }} fixed prompts ({{ proof.logits.tokens }} tokens) are
{%- if proof.logits.bit_equal %} bit-equal to the engine's.
{%- else %} within {{ "%.3g" % proof.logits.max_abs_difference }} of the engine's; limit {{ "%.3g" % proof.logits.bound }}.
{%- endif %}
"""


def provenance(job: ExportSpec, source: Source) -> dict[str, Any]:
    """Where an export comes from: the values that the card, the artefact and the report show. Holds no time or host."""
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
        "first_weights": list(job.first_weights),
        "checkpoint_sha256": source.manifest_sha256,
        "config_hash": job.config_hash,
        "data_hash": source.checkpoint.data_hash,
        "tokenizer_hash": source.tokenizer.hash,
        "git_commit": git_commit(Path(longhaul.__file__).parent),
        "versions": {"longhaul": longhaul.__version__}
        | {name: version(name) for name in ("torch", "deepspeed", "transformers", "safetensors")},
    }


def card(facts: dict[str, Any], architecture: str, parameters: int, folder: str, proof: dict[str, Any]) -> str:
    """The README.md of an export."""
    base, base_hub = _base_model(facts["model"] or {})
    plain = {key: value for key, value in facts.items() if isinstance(value, str | int) and value != ""}
    rows = [*plain.items(), *facts["versions"].items()]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)
    return environment.from_string(CARD).render(
        p=facts,
        base=base,
        base_hub=base_hub,
        architecture=architecture,
        parameters=parameters,
        folder=folder,
        proof=proof,
        rows=[(name.replace("_", " "), value) for name, value in rows],
    )


def _base_model(model: dict[str, Any]) -> tuple[str, str]:
    """The pretrained weights in words, and their hub id; both empty when the model was made from a config."""
    if hub := model.get("hub"):
        return f"{hub['id']} at {hub['revision']}", hub["id"]
    if "path" in model and "files" in model:
        return f"the pretrained folder {Path(model['path']).name} ({canonical_json(model['files'])})", ""
    return "", ""


def git_commit(folder: Path) -> str:
    """The commit of the checkout that `folder` is in, `-dirty` appended when it was edited; "" outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
