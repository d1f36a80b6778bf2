"""Settings: what may be written, where, and what the one line says when it is wrong."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.configs.config import Config
from foveate.configs.describe import describe_settings, render
from foveate.configs.errors import ConfigError
from foveate.configs.load import load, preset_names

GOOD = [
    ("cache.block_tokens=32", 32),
    ("cache.memory_fraction=1", 1.0),
    ("cache.prefix_sharing=false", False),
    ("cache.prefix_sharing=True", True),
    ("model.device=cpu", "cpu"),
    ("model.path=a=b", "a=b"),
    ("model.name=", ""),
    ("server.image_url_hosts=a.example, b.example", ("a.example", "b.example")),
    ("server.api_keys=", ()),
    ('server.api_keys=["a","b"]', ("a", "b")),
    ("server.api_keys=['a', \"b\", c]", ("a", "b", "c")),
    ("server.api_keys=[a, b]", ("a", "b")),
    ("server.api_keys=[secret]", ("secret",)),
    ("server.api_keys=[12, no, 2026-11-21, ~]", ("12", "no", "2026-11-21", "~")),
    ("server.api_keys=12", ("12",)),
    ('server.api_keys="a,b"', ("a,b",)),
    ('server.api_keys=["a,b", "c d"]', ("a,b", "c d")),
    ('server.api_keys=["\\ud83d\\ude00"]', ("\U0001f600",)),
    ('server.image_url_hosts=["[::1]"]', ("[::1]",)),
    ("server.image_url_hosts=[*.example, %]", ("*.example", "%")),
    ("server.image_url_hosts=[]", ()),
    ("server.image_url_hosts= [ ] ", ()),
    ("model.quantize=[head, tower]", ("head", "tower")),
    ("server.port= 0", 0),
    ("limits.fetch_timeout_s=2e-1", 0.2),
]

BAD = [
    ("cache.block_token=16", ["cache.block_token", "no such setting", "did you mean cache.block_tokens?"]),
    ("port=80", ["port", "did you mean server.port?"]),
    ("zzzzzz=1", ["zzzzzz", "no such setting", "foveate config"]),
    ("cash.block_tokens=16", ["did you mean cache.block_tokens?"]),
    ("cache.block_tokens", ["cache.block_tokens", "section.key=value"]),
    ("cache.block_tokens=many", ["cache.block_tokens", "many", "whole number"]),
    ("cache.block_tokens=16.5", ["cache.block_tokens", "16.5", "whole number"]),
    ("cache.block_tokens=24", ["cache.block_tokens", "24", "power of two"]),
    ("cache.memory_fraction=1.5", ["cache.memory_fraction", "1.5", "(0, 1]"]),
    ("cache.memory_fraction=nan", ["cache.memory_fraction", "nan", "a number"]),
    ("server.drain_s=inf", ["server.drain_s", "inf", "a number"]),
    ("server.drain_s=-1", ["server.drain_s", "-1", "negative"]),
    ("cache.prefix_sharing=maybe", ["cache.prefix_sharing", "maybe", "true or false"]),
    ("model.device=cudda", ["model.device", "cudda", "auto, cpu, cuda", "did you mean cuda?"]),
    ("server.port=70000", ["server.port", "70000", "0..65535"]),
    ("budget.tokens=-3", ["budget.tokens", "-3", "0 means no cap"]),
    (f"limits.images={2**70}", ["limits.images", "whole number"]),
    ("model\nname=1", ["no such setting"]),
    ('server.image_url_hosts=["a', ["server.image_url_hosts", "list of texts", 'write ["a", "b"]']),
    ("server.image_url_hosts=[[a]]", ["server.image_url_hosts", "item 0 is ['a']", "quotes"]),
    ('server.image_url_hosts=["a", {b: c}]', ["server.image_url_hosts", "item 1 is {'b': 'c'}"]),
    ('server.api_keys=["good", ""]', ["server.api_keys", "key 1", "empty"]),
    ('server.api_keys=[" a"]', ["server.api_keys", "key 0", "blanks"]),
    ("model.quantize=[head, tail]", ["model.quantize", "tail", "head, embeddings, tower"]),
]


def value_of(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize(("item", "value"), GOOD)
def test_set_is_typed_by_the_field(item: str, value: object) -> None:
    found = value_of(load(sets=[item]), item.partition("=")[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("item", "words"), BAD)
def test_a_wrong_set_says_key_value_and_remedy_in_one_line(item: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(sets=[item])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


BAD_FILES = [
    ("cache: {block_token: 16}", ["cache.block_token", "did you mean cache.block_tokens?"]),
    ("cash: {block_tokens: 16}", ["cash", "did you mean cache?"]),
    ("cache: {block_tokens: '16'}", ["cache.block_tokens", "16", "whole number"]),
    ("cache: {block_tokens: true}", ["cache.block_tokens", "True", "whole number"]),
    ("cache: {memory_fraction: true}", ["cache.memory_fraction", "True", "a number"]),
    ("cache: {prefix_sharing: 1}", ["cache.prefix_sharing", "1", "true or false"]),
    ("model: {name: 7}", ["model.name", "7", "text"]),
    ("model: {device: [cpu]}", ["model.device", "['cpu']", "one of auto, cpu, cuda"]),
    ("server: {api_keys: [1, 2]}", ["server.api_keys", "[1, 2]", "list"]),
    ("server: {api_keys: [a, 2]}", ["server.api_keys", "item 1 is 2", "quotes"]),
    ("cache: 16", ["16", "settings under cache"]),
    ("- a\n- b", ["['a', 'b']", "sections"]),
    ("1: 2", ["1", "no such section"]),
    ("cache:\n  block_tokens: [16\nmodel: {}", ["line 3", "not YAML"]),
    ("model: !!python/object/apply:os.system ['true']", ["line 1", "not YAML"]),
    ("\x00", ["not YAML"]),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES)
def test_a_wrong_file_says_where_and_what(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_names_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"gpus.*no such file.*cpu, gpu, long-documents.*did you mean gpu\?"):
        load("gpus")


def test_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("server:\n  port: 1\n  host: file\n  decode_workers: 7\nvision:\n")
    environment = {
        "FOVEATE__SERVER__PORT": "2",
        "FOVEATE__SERVER__HOST": "env",
        "FOVEATE_SERVER_PORT": "tcp://10.0.0.1",
    }
    server = load(file, ["server.port=3", "server.port=4"], environment).server
    assert (server.port, server.host, server.decode_workers) == (4, "env", 7)


def test_an_unknown_variable_of_ours_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"server\.prot.*did you mean server\.port"):
        load(environment={"FOVEATE__SERVER__PROT": "1"})


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_change_something(name: str) -> None:
    assert load(name) != Config()


def test_nothing_given_is_the_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load() == load(empty) == Config()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_rendered_loads_to_the_same(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    texts = ["", "no", "1e3", "a: b # c", "ü'\"", "~", "- x", "2026-11-21", "x" * 300, "{", "..."]
    base = Config()
    config = replace(
        base,
        model=replace(base.model, path=draw.choice(texts), name=draw.choice(texts), threads=draw.randrange(99)),
        cache=replace(base.cache, memory_fraction=draw.uniform(1e-9, 1), prefix_sharing=draw.random() < 0.5),
        server=replace(
            base.server, api_keys=tuple(t for t in draw.sample(texts, 3) if t), drain_s=draw.random() * 1e-6
        ),
    )
    file = tmp_path / "config.yaml"
    file.write_text(render(config), encoding="utf-8")
    assert load(file) == config


@settings(deadline=None, max_examples=50)  # each example renders and loads every setting
@given(st.lists(st.text()))
def test_a_rendered_list_means_the_list_in_a_file_in_set_and_in_the_environment(texts: list[str]) -> None:
    base = Config()
    config = replace(base, server=replace(base.server, image_url_hosts=tuple(texts)))
    line = next(line for line in render(config).split("\n") if line.startswith("  image_url_hosts: "))
    written = line.removeprefix("  image_url_hosts: ").rpartition("  # ")[0]
    assert load(sets=[f"server.image_url_hosts={written}"]) == config
    assert load(environment={"FOVEATE__SERVER__IMAGE_URL_HOSTS": written}) == config
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(render(config), encoding="utf-8", newline="")
        assert load(file) == config


def test_every_setting_is_described() -> None:
    described = {s.key: s for s in describe_settings()}
    assert described["cache.block_tokens"].comment.startswith("tokens in one block; a power of two")
    assert described["cache.block_tokens"].default == 16 and described["cache.block_tokens"].legal == "a whole number"
    assert described["server.api_keys"].comment == "empty: no authentication"
    text = render(Config())
    assert all(f"  {key.partition('.')[2]}: " in text for key in described)
