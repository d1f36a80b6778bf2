"""Prompts: rendered as `transformers` renders them, and nothing typed becomes a special token."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

import foveate.bundled
from foveate.configs.errors import ConfigError
from foveate.engine.common import ModelInfo
from foveate.server.common.errors import ApiError
from foveate.server.common.protocol import Message
from foveate.server.prepare.conversation import Turn
from foveate.server.prepare.prompt import Prompter
from foveate.server.prepare.request import conversation
from foveate.server.prepare.template import Template, TemplateFailed

MODEL = ModelInfo(
    family="llava", max_context=2000, vocab_size=259, image_token_id=2, n_parameters=1, dtype="float32", device="cpu",
    weights="fp32", kernels="avx2",
    block_tokens=16, n_blocks=100,
)  # fmt: skip
# In the manner of LLaVA-1.5's: pictures first, content only as parts.
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_ONLY = "{% for m in messages %}[{{ m['role'] + ': ' + m['content'] }}]{% endfor %}"


def messages(*contents: object) -> list[Turn]:
    roles = ("user", "assistant")
    return turns({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))


def turns(said: Iterable[object]) -> list[Turn]:
    return conversation([Message.model_validate(one) for one in said])


def picture() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "u"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def prompter(tokenizer: Tokenizer, source: str | None, bos: str | None = None) -> Prompter:
    special = {"bos_token": bos} if bos else {}
    return Prompter(tokenizer, None if source is None else Template(source, special), bos)


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_content_takes_the_form_the_template_knows(tokenizer: Tokenizer) -> None:
    parts = prompter(tokenizer, PARTS_ONLY)
    assert decoded(tokenizer, parts.chat(messages("hi"), MODEL)) == "USER: hi ASSISTANT:"
    ids = parts.chat(messages([text("what"), picture()], "this", "and?"), MODEL)
    assert decoded(tokenizer, ids) == "USER: <image>\nwhat ASSISTANT: this USER: and? ASSISTANT:"
    flat = prompter(tokenizer, TEXT_ONLY)
    assert decoded(tokenizer, flat.chat(messages("hi"), MODEL)) == "[user: hi]"
    assert decoded(tokenizer, flat.chat(messages([picture(), text("what")]), MODEL)) == "[user: <image>\nwhat]"


def test_one_begin_token_whoever_writes_it(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="<|turn|> $A", special_tokens=[("<|turn|>", 1)])
    for source in (TEXT_ONLY, "{{ bos_token }}" + TEXT_ONLY):
        ids = prompter(tokenizer, source, "<|turn|>").chat(messages("hi"), MODEL)
        assert ids.count(1) == 1 and ids[0] == 1
    assert prompter(tokenizer, None).complete("hi", MODEL, "prompt")[0] == 1
    assert 1 not in prompter(tokenizer, None).complete("hi", MODEL, "prompt", add_special_tokens=False)


def test_developer_is_system(tokenizer: Tokenizer) -> None:
    said = turns([{"role": "developer", "content": "x"}])
    assert decoded(tokenizer, prompter(tokenizer, TEXT_ONLY).chat(said, MODEL)) == "[system: x]"


def test_without_a_template_there_is_no_chat(tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError, match="no chat template"):
        prompter(tokenizer, None).chat(messages("hi"), MODEL)


def test_a_template_that_drops_images_is_noticed(tokenizer: Tokenizer) -> None:
    source = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    with pytest.raises(ApiError, match="0 places for 1 images"):
        prompter(tokenizer, source).chat(messages([picture(), text("what")]), MODEL)


def test_what_a_template_says_and_what_it_may_not_do() -> None:
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        Template("{{ raise_exception('roles must alternate') }}", {}).render([], True)
    for source in (
        "{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}", "{{ messages[5]['x']['y'] }}",
        "{% for i in range(9999999) %}x{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ):  # fmt: skip
        with pytest.raises(TemplateFailed):
            Template(source, {}).render([], True)
    with pytest.raises(ConfigError, match="line 1"):
        Template("{% if %}", {})


def test_generation_marks_and_loop_controls_are_known() -> None:
    source = "{% for i in [1, 2] %}{% generation %}{{ i }}{% endgeneration %}{% break %}{% endfor %}"
    assert Template(source, {}).render([], True) == "1"
    assert (
        Template("{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}", {}).render([], True) == '{"a": "<é>"}4'
    )


def test_files_in_their_order_of_precedence(model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(model_dir / "tokenizer.json", tmp_path)
    entry = [{"name": "tools", "template": "no"}, {"name": "default", "template": "config" + TEXT_ONLY}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry, "bos_token": None}))
    (tmp_path / "additional_chat_templates").mkdir()
    seen = []
    for name, content in (  # each wins over those before it, as in `ProcessorMixin.from_pretrained`
        ("", ""),
        ("additional_chat_templates/default.jinja", "more" + TEXT_ONLY),
        ("chat_template.jinja", "jinja" + TEXT_ONLY),
        ("chat_template.json", json.dumps({"chat_template": "json" + TEXT_ONLY})),
        ("processor_config.json", json.dumps({"chat_template": {"default": "processor" + TEXT_ONLY}})),
    ):
        if name:
            (tmp_path / name).write_text(content)
        loaded = Prompter.load(tmp_path)
        seen.append(decoded(loaded.tokenizer, loaded.chat(messages("x"), MODEL)).partition("[")[0])
    assert seen == ["config", "more", "jinja", "json", "processor"]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="tokenizer.json is broken"):
        Prompter.load(tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer.json"):
        Prompter.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_bundled_models_render_as_with_transformers(name: str) -> None:
    directory = foveate.bundled.path(name)
    assert directory is not None
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    token = json.loads((directory / "config.json").read_text())
    image_id = token.get("image_token_id", token.get("image_token_index"))
    model = ModelInfo(
        family="", max_context=2000, vocab_size=len(theirs), image_token_id=image_id, n_parameters=1, dtype="",
        weights="", kernels="", device="", block_tokens=16, n_blocks=1,
    )  # fmt: skip
    asked = messages([picture(), text("What colour is the star?\n"), picture()], "Red.", "Sure?")
    said = [
        {"role": "user", "content": [{"type": "image"}, text("What colour is the star?\n"), {"type": "image"}]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Sure?"},
    ]
    for generate in (True, False):
        want = theirs.apply_chat_template(said, add_generation_prompt=generate, tokenize=True, return_dict=False)
        assert Prompter.load(directory).chat(asked, model, generate) == want
    typed = messages(f"x {theirs.convert_ids_to_tokens(image_id)}")
    assert image_id not in Prompter.load(directory).chat(typed, model), "a typed placeholder shows no picture"


def test_the_server_loads_no_tensors() -> None:
    code = "import sys, foveate.server.app, foveate.server.fetch; print([m for m in %r if m in sys.modules])"
    heavy = ["torch", "transformers", "numpy"]
    done = subprocess.run([sys.executable, "-P", "-c", code % heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
