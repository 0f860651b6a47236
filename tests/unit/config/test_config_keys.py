"""Every key of a config and of a site file does something: none is only written down."""

from __future__ import annotations

import re
import typing
from collections import defaultdict
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from longhaul.checks.collective_benchmarks import COLLECTIVES
from longhaul.config.architectures import Decoder, Model
from longhaul.config.run_config import Config
from longhaul.config.site_config import FabricLimits, Site
from tests.support.chain import REPOSITORY

PACKAGE = REPOSITORY / "workflow" / "longhaul"
# Where keys are written down; conditions between them (validators) are no use of a key either.
WRITTEN_DOWN = {PACKAGE / "config" / name for name in ("models.py", "sites.py", "architectures.py", "generate.py")}
READERS = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py") if path not in WRITTEN_DOWN)

# Read as one: a network's sizes go to transformers, limits are looked up by the name of what was measured.
READ_AS_ONE = (Decoder, Model, FabricLimits)


def holders(annotation: object, key: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """(key, model) of all models below a type, with the key that holds each."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield key, annotation
        for name, field in annotation.model_fields.items():
            yield from holders(field.annotation, name)
    for argument in typing.get_args(annotation):
        yield from holders(argument, key)


def keys_of_models() -> dict[type[BaseModel], set[str]]:
    found: dict[type[BaseModel], set[str]] = defaultdict(set)
    for key, model in (*holders(Config, "config"), *holders(Site, "site")):
        found[model].add(key)
    return {model: keys for model, keys in found.items() if not issubclass(model, READ_AS_ONE)}


HOLDERS = keys_of_models()


def owners(model: type[BaseModel]) -> set[str]:
    """What holds a model, in code: the key it is the value of, or the last word of its or its base's name."""
    bases = [base.__name__ for base in model.__mro__ if issubclass(base, BaseModel)]
    return HOLDERS[model] | {re.findall(r"[A-Z][a-z]*", name)[-1].lower() for name in bases}


def patterns(model: type[BaseModel], name: str) -> Iterator[str]:
    """How a key is read; one that several models have, only from what is named like its own."""
    if sum(name in other.model_fields for other in HOLDERS) == 1:
        yield rf"\.{name}\b|\"{name}\""
    for owner in owners(model):
        # stage.name, stages[0].name, config.datasets[x].kind
        yield rf"\b{owner.removesuffix('s')}s?(\[[^\]]*\])?\.{name}\b"


CASES = [(model, name) for model in HOLDERS for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), CASES, ids=[f"{model.__name__}.{name}" for model, name in CASES])
def test_a_key_is_read_somewhere(model: type[BaseModel], name: str):
    assert any(re.search(pattern, READERS) for pattern in patterns(model, name)), (
        f"{model.__name__}.{name} is read nowhere"
    )


def test_floors_are_those_of_what_is_measured():
    names = {f"{collective.name}_gbps" for collective in COLLECTIVES} | {"all_reduce_latency_us"}
    assert set(FabricLimits.model_fields) == names
