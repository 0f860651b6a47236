"""Each engine starts with the right command, environment and API key."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from longhaul.config.load_config import load_site
from longhaul.config.serve_config import Serve
from longhaul.config.site_serving_config import EngineName, Serving
from longhaul.errors import UserError
from longhaul.serving import require_key
from longhaul.serving.api_key import create_key_file, read_key_file
from longhaul.serving.engines import ENGINES, Server, ServerShape
from tests.support.small_configs import SITE, changed

MODEL = Path("/results/run/export/chat/abc-90-bf16")
KEY = "0123456789abcdef" * 4
OPTIONS = json.loads(Path(__file__).with_name("engine_options.json").read_text())


ON_ONE_NODE = ServerShape(tensor=4, context_tokens=2048)
ON_TWO_NODES = ServerShape(nodes=2, tensor=8, pipeline=2, expert_parallel=True, max_running_requests=64)


def server(engine: EngineName, shape: ServerShape = ON_ONE_NODE, **keys: object) -> Server:
    serving = Serving.model_validate({"engine": engine, "python": ("/opt/engine/bin/python",), **keys})
    key_file = Path("/private/key.yaml") if ENGINES[engine].accepts_key else None
    return Server(serving, MODEL, "run-chat", "bf16", "127.0.0.1", 8123, shape, key_file)


def test_the_words_of_each_engine():
    address = ["--host", "127.0.0.1", "--port", "8123"]
    assert list(server("transformers").command()) == [
        *("/opt/engine/bin/python", "-m", "transformers.cli.transformers", "serve", str(MODEL), *address),
    ]
    assert list(server("vllm", options=("--kv-cache-dtype=fp8",)).command()) == [
        *("/opt/engine/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)),
        *("--served-model-name", "run-chat", "--tensor-parallel-size", "4", "--pipeline-parallel-size", "1"),
        *(
            "--dtype",
            "bfloat16",
            "--max-model-len",
            "2048",
            "--disable-uvicorn-access-log",
            "--middleware",
            "require_key.RequireKey",
            *address,
            "--kv-cache-dtype=fp8",
        ),
    ]
    assert list(server("sglang").command()) == [
        *("/opt/engine/bin/python", "-m", "sglang.launch_server", "--model-path", str(MODEL)),
        *("--served-model-name", "run-chat", "--tp-size", "4", "--pp-size", "1"),
        *(
            "--dtype",
            "bfloat16",
            "--context-length",
            "2048",
            "--log-level",
            "warning",
            "--config",
            "/private/key.yaml",
            *address,
        ),
    ]


def test_a_server_of_one_job_has_the_limits_of_the_section_serve():
    serve = Serve(max_running_requests=16, expert_parallel=True)
    shape = ServerShape.of_job(serve, 2, 4, 2, 2048)
    assert shape == ServerShape(2, 4, 2, expert_parallel=True, context_tokens=2048, max_running_requests=16)


def test_the_words_on_the_second_of_two_nodes():
    leader = ("node-a", 29000)
    vllm = " ".join(server("vllm", ON_TWO_NODES).command(1, leader))
    assert (
        "--tensor-parallel-size 8 --pipeline-parallel-size 2 --enable-expert-parallel --dtype bfloat16 --max-num-seqs 64"
        in vllm
    )
    assert "--nnodes 2 --node-rank 1 --master-addr node-a --master-port 29000 --headless" in vllm
    assert "--headless" not in server("vllm", ON_TWO_NODES).command(0, leader)
    sglang = " ".join(server("sglang", ON_TWO_NODES).command(1, leader))
    assert "--tp-size 8 --pp-size 2 --ep-size 8 --dtype bfloat16 --max-running-requests 64" in sglang
    assert "--nnodes 2 --node-rank 1 --dist-init-addr node-a:29000" in sglang


def option_words(words: tuple[str, ...]) -> dict[str, list[str]]:
    """Return option -> the words after it, up to the next option."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[word] = []
        elif found:
            found[list(found)[-1]].append(word)
    return found


@pytest.mark.parametrize("engine", OPTIONS)
@pytest.mark.parametrize(
    ("shape", "leader"), [(ON_ONE_NODE, None), (ON_TWO_NODES, ("10.0.0.1", 29000))], ids=["one node", "two nodes"]
)
def test_the_engines_parser_has_every_option(engine: EngineName, shape: ServerShape, leader: tuple[str, int] | None):
    """Compares with the options of one release of each engine, which are recorded in engine_options.json."""
    known = OPTIONS[engine]["options"]
    for rank in range(shape.nodes):
        for option, words in option_words(replace(server(engine, shape), drain_s=60).command(rank, leader)).items():
            assert len(words) == known[option]["value"], option
            assert words[0] in known[option].get("choices", words) if words else True, option


@pytest.mark.parametrize("engine", OPTIONS)
def test_no_spelling_of_an_option_that_longhaul_sets_may_be_in_the_site_file(engine: EngineName):
    for option, facts in OPTIONS[engine]["options"].items():
        for name in (option, *facts["aliases"]):
            if name != "--middleware":  # several may be given
                with pytest.raises(ValueError, match="which longhaul sets itself"):
                    Serving(engine=engine, options=(f"{name}=1",))


def test_without_a_python_of_its_own_an_engine_starts_in_the_job_environment():
    assert Server(Serving(), MODEL, "m", "fp32", "127.0.0.1", 1).command()[:2] == (sys.executable, "-m")


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_gets_its_key_on_the_command_line(engine: EngineName):
    found = server(engine, environment={"OMP_NUM_THREADS": "2"})
    assert not any(KEY in word for word in found.command())
    assert found.environment(KEY)["OMP_NUM_THREADS"] == "2"
    assert (KEY in found.environment(KEY).values()) == (engine == "vllm")
    assert "VLLM_API_KEY" not in found.environment(None)


def test_vllm_finds_the_check_of_the_key_beside_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "/code")
    own = replace(server("vllm"), key_file=tmp_path / "key.yaml")
    own.place_files()
    assert (tmp_path / "require_key.py").read_text() == Path(require_key.__file__).read_text()
    assert own.environment(KEY)["PYTHONPATH"] == f"{tmp_path}:/code"
    assert "--middleware" not in replace(own, key_file=None).command()


def test_requests_name_the_model_as_the_engine_wants_it():
    assert server("transformers").requested_model == str(MODEL)
    assert {server("vllm").requested_model, server("sglang").requested_model} == {"run-chat"}
    assert server("vllm").health_url == "http://127.0.0.1:8123/health"


def test_a_key_file_is_for_its_owner_alone_and_for_one_server(tmp_path: Path):
    path = tmp_path / "key.yaml"
    key = create_key_file(path)
    assert (len(key), path.stat().st_mode & 0o777, read_key_file(path)) == (64, 0o600, key)
    with pytest.raises(FileExistsError):
        create_key_file(path)
    path.chmod(0o640)
    with pytest.raises(UserError, match=r"others may read the API key in .*: its mode is 640") as refused:
        read_key_file(path)
    assert refused.value.hint == f"chmod 600 {path}"
    path.chmod(0o600)
    assert read_key_file(path) == key


@pytest.mark.parametrize("key", ["0123456701234567", "1234_5678_9012_3456", "0x12345678abcdef", KEY, ""])
def test_yaml_reads_the_same_key(tmp_path: Path, key: str):
    """Without quotes, YAML reads the first three as numbers."""
    path = tmp_path / "key.yaml"
    written = create_key_file(path, key)
    assert yaml.safe_load(path.read_text()) == {"api-key": written} and read_key_file(path) == written


def test_a_key_file_without_quotes_is_read(tmp_path: Path):
    path = tmp_path / "key.yaml"
    path.write_text(f"api-key: {KEY}\n")
    path.chmod(0o600)
    assert read_key_file(path) == KEY


@pytest.mark.parametrize(
    "text",
    [
        "",
        'api-key: "0123456789abcdef\n',
        "api-key: -123456789abcdef\n",
        "api-key: short\n",
        "api-key: 0123456789abcdef $(id)\n",
        "api-key: a\napi-key: b\n",
    ],
)
def test_a_key_file_with_something_else_is_refused_until_it_is_deleted(tmp_path: Path, text: str):
    path = tmp_path / "key.yaml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UserError, match="does not hold one line `api-key: KEY`"):
        read_key_file(path)
    path.unlink()
    key = create_key_file(path)
    assert read_key_file(path) == key


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"engine": "ollama"}, "serving.engine is 'ollama'"),
        ({"options": ["--host=0.0.0.0"]}, "options contains --host, which longhaul sets itself"),
        ({"options": ["--api-k=x"]}, "options contains --api-k (--api-key), which longhaul sets itself"),
        ({"options": ["--enforce-eager; id\n"]}, "serving.options.0"),
        ({"environment": {"VLLM_API_KEY": "x"}}, "environment sets VLLM_API_KEY, which longhaul sets for each server"),
    ],
)
def test_mistakes_in_the_site_key(tmp_path: Path, keys: dict[str, object], expected: str):
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(changed(SITE, {"serving": keys})))
    with pytest.raises(UserError) as refused:
        load_site("./site.yaml", tmp_path)
    assert expected in str(refused.value)
