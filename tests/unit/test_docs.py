"""The documentation names only things that exist: links, paths, make targets, verbs, files below results/."""

from __future__ import annotations

import ast
import json
import re
import shlex
import textwrap
from collections import Counter
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from longhaul.artifacts.paths import JobFolder, RunPaths, WeightsFolder
from longhaul.cli import app
from longhaul.config.shipped_files import KEY_LIST
from longhaul.jobs.job_kind import job_kinds

REPOSITORY = Path(__file__).resolve().parents[2]
INDEX = REPOSITORY / "docs" / "README.md"
PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(REPOSITORY.glob("docs/**/*.md")),
    REPOSITORY / "config" / "README.md",
]
TOP_FOLDERS = "bench|config|docs|envs|profiles|templates|tests|workflow"
PATH = re.compile(rf"`((?:{TOP_FOLDERS})/[^`\s<>]*)`")

NAMED_PAGE = re.compile(r"(?<![\w/.-])docs/[\w/-]+\.md")
"""A page that a text names by its path in the repository; not a part of a URL."""


def page_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def links(page: Path) -> list[str]:
    """Return a page's relative links, without those in code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def linked_pages(page: Path) -> set[Path]:
    targets = ((page.parent / link.partition("#")[0]).resolve() for link in links(page) if not link.startswith("#"))
    return {target for target in targets if target.suffix == ".md"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_resolves(page: Path):
    broken = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_reachable_from_the_index():
    reached, waiting = {INDEX}, [INDEX]
    while waiting:
        new = linked_pages(waiting.pop()) - reached
        reached |= new
        waiting += new
    assert sorted(page_name(page) for page in set(PAGES) - reached) == []


def test_unit_tests_are_in_the_folders_of_the_package():
    """docs/testing.md says so."""
    folders = {
        file.parent.relative_to(REPOSITORY / "tests/unit") for file in REPOSITORY.glob("tests/unit/**/test_*.py")
    }
    assert sorted(str(folder) for folder in folders if not (REPOSITORY / "workflow/longhaul" / folder).is_dir()) == []


def test_the_changelog_has_one_line_for_a_change_and_a_short_first_release():
    """A merge can put a change into two sections."""
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    changes = [line for line in text.splitlines() if line.startswith("- ")]
    assert [change for change, number in Counter(changes).items() if number > 1] == []
    assert len(text.partition("## [0.2.0]")[2].strip().splitlines()) <= 40
    assert [line for line in text.splitlines() if len(line) > 150] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_path_exists(page: Path):
    named = PATH.findall(page.read_text(encoding="utf-8"))
    assert [path for path in named if not any(REPOSITORY.glob(path.rstrip("/")))] == []


def strings_in(module: Path) -> str:
    """Return the texts of a module that a user may see: all string constants without docstrings."""
    nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    statements = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements
    )


def test_pages_that_messages_and_shipped_files_name_are_in_the_wheel():
    """A user of the wheel has no checkout, so a message names the full path: KEY_LIST."""
    build = ast.parse((REPOSITORY / "hatch_build.py").read_text(encoding="utf-8"))
    (shared,) = (ast.literal_eval(node.value) for node in build.body if isinstance(node, ast.Assign))
    shipped = {
        file for path in shared for file in (REPOSITORY / path, *(REPOSITORY / path).rglob("*")) if file.is_file()
    }
    texts = {file: file.read_text(encoding="utf-8") for file in shipped if file.suffix != ".md"}
    texts |= {module: strings_in(module) for module in (REPOSITORY / "workflow" / "longhaul").rglob("*.py")}
    named = [(file, REPOSITORY / page) for file, text in texts.items() for page in NAMED_PAGE.findall(text)]
    assert len(named) > 5
    assert [(str(file), str(page)) for file, page in named if page not in shipped] == []
    assert KEY_LIST in shipped


def test_the_table_of_changes_names_existing_places():
    table = (
        (REPOSITORY / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .split("## Where do I change")[1]
        .split("## Conventions")[0]
    )
    named = PATH.findall(table)
    assert len(named) > 60
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def example_schemas() -> list[dict[str, Any]]:
    """Return the schemas of what a YAML example may show: a config, a site file, a stage or a dataset."""
    schemas = [
        json.loads((REPOSITORY / "config" / name).read_text("utf-8"))
        for name in ("config.schema.json", "site.schema.json")
    ]
    parts = [{**schemas[0]["$defs"][name], "$defs": schemas[0]["$defs"]} for name in ("Stage", "Dataset")]
    return [*schemas, *parts]


def without_ellipsis(value: Any) -> Any:
    """Return a YAML example without the keys that stand for omitted ones."""
    if isinstance(value, dict):
        return {key: without_ellipsis(part) for key, part in value.items() if key != "…"}
    return [without_ellipsis(part) for part in value] if isinstance(value, list) else value


def schema_errors(example: Any, schema: dict[str, Any]) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(example)
    return [error.message for error in errors if error.validator != "required"]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_yaml_example_has_known_keys(page: Path):
    blocks = re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        example = without_ellipsis(yaml.safe_load(textwrap.dedent(block)))
        errors = [schema_errors(example, schema) for schema in example_schemas() if example]
        assert [] in errors or not example, f"{block}{errors}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_make_target_exists(page: Path):
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    commands = re.findall(
        r"(?:^|`)(?:[A-Z]+=\S+ )?make ((?:[a-z][\w-]*[ ]?)+)", page.read_text("utf-8"), flags=re.MULTILINE
    )
    assert {target for command in commands for target in command.split()} - targets == set()


@pytest.mark.parametrize("paths", [RunPaths("<run>"), JobFolder(Path("job")), WeightsFolder(Path("weights"))], ids=repr)
def test_every_file_below_results_is_described(paths: RunPaths | JobFolder | WeightsFolder):
    page = (REPOSITORY / "docs" / "reference" / "results.md").read_text(encoding="utf-8")
    properties = [name for name, value in vars(type(paths)).items() if isinstance(value, property)]
    names = {getattr(paths, name).name for name in properties} - {"<run>"}
    assert len(names) >= 10
    assert {name for name in names if name not in page} == set()


def visible_verbs(command: Any, name: str) -> dict[str, Any]:
    """Return the verbs below a command group that --help shows, by their full name."""
    if command.hidden:
        return {}
    if not hasattr(command, "commands"):
        return {name: command}
    found = [visible_verbs(part, f"{name} {word}") for word, part in command.commands.items()]
    return {verb: part for verbs in found for verb, part in verbs.items()}


def test_every_verb_and_option_is_described():
    page = (REPOSITORY / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    verbs = visible_verbs(typer.main.get_command(app), "longhaul")
    names = [name for verb in verbs.values() for parameter in verb.params for name in parameter.opts]
    assert len(verbs) >= 7
    assert {verb for verb in verbs if f"### {verb}" not in page} == set()
    assert {name for name in names if name.startswith("-") and f"`{name}" not in page} == set()


def longhaul_commands(page: Path) -> list[list[str]]:
    """Return the words after `longhaul` of each such command in a page's code blocks."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for language, block in blocks if language in ("", "bash") for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"(?:\S*/)?longhaul ", line)]
    return [words[1:] for words in found]


@pytest.mark.parametrize("page", sorted(REPOSITORY.glob("docs/how-to/*.md")), ids=page_name)
def test_commands_of_a_guide_can_be_pasted(page: Path):
    """A shell reads <run> as a redirection. Only the address of the repository is not known."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [name for block in blocks for name in re.findall(r"<[a-z]+>", block) if name != "<repository>"] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_longhaul_command_exists(page: Path):
    """Verbs and options; the options that `longhaul run` does not know go to Snakemake."""
    for words in longhaul_commands(page):
        command: Any = typer.main.get_command(app)
        verbs = list(takewhile(lambda word: not word.startswith("-"), words))
        while verbs and hasattr(command, "commands"):
            assert verbs[0] in command.commands, words
            command = command.commands[verbs.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert words[0] == "run" or used <= known, words


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_example_that_init_copies_exists(page: Path):
    for words in longhaul_commands(page):
        options = dict(pairwise(words))
        for option, folder in (("--example", "examples"), ("--site", "sites")):
            name = options.get(option, "")
            assert not re.match(r"\w", name) or (REPOSITORY / "config" / folder / f"{name}.yaml").exists(), words


@pytest.mark.parametrize("name", ["cli.md", "results.md"])
def test_every_job_kind_is_described(name: str):
    page = (REPOSITORY / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert {kind for kind in job_kinds() if kind not in page} == set()
