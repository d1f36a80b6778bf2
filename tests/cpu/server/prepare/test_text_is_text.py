"""Text of users is text: no spelling of a control token is refused, and none becomes one."""

import time
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import foveate.bundled
from foveate.engine.common import ModelInfo
from foveate.server.common.errors import ApiError
from foveate.server.prepare.conversation import MessageText, PicturePlace, Turn
from foveate.server.prepare.encoding import Encoder
from foveate.server.prepare.prompt import Prompter
from foveate.server.prepare.question import caption_ids, question_ids
from foveate.server.prepare.template import Template

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>")


def bytewise() -> Tokenizer:
    """In the manner of Qwen: bytes, no space in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    letters = [chr(c) for c in range(33, 127)] + ["\u2581"]
    pieces = [*SPECIALS[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "\u2581t", "he", "\u2581the"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))


def legacy_llama() -> Tokenizer:
    """In the manner of Llama 2: a normalizer puts the space in front; <s>, </s> lie inside the vocabulary."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """In the manner of newer Llama files: only the first piece of a prompt gets the space in front."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def made(build: Callable[[], Tokenizer]) -> Tokenizer:
    tokenizer = build()
    decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if build is not bytewise:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer


def in_vocabulary(build: Callable[[dict[str, int]], Tokenizer]) -> Tokenizer:
    """Control tokens are pieces that typed text could make: whole words, the best pieces, or the result of merges."""
    letters = [chr(c) for c in range(33, 127)] + ["\u2581", "<s"]
    tokenizer = build({piece: i for i, piece in enumerate([*SPECIALS, *letters])})
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


def words(pieces: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def unigram(pieces: dict[str, int]) -> Tokenizer:
    scores = [(piece, 0.0 if piece in SPECIALS else -5.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def merged(pieces: dict[str, int]) -> Tokenizer:
    return Tokenizer(models.BPE(vocab=pieces, merges=[("<", "s"), ("<s", ">")], unk_token="<unk>"))


def looking_in(normalizer: normalizers.Normalizer) -> Tokenizer:
    """Control tokens are looked for in normalized text."""
    tokenizer = in_vocabulary(lambda pieces: Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>")))
    tokenizer.normalizer = normalizer
    looked_for = Tokenizer.from_str(tokenizer.to_str().replace('"normalized":false', '"normalized":true'))
    assert all(token.normalized for token in looked_for.get_added_tokens_decoder().values())
    return looked_for


def bundled(name: str) -> Tokenizer:
    directory = foveate.bundled.path(name)
    assert directory is not None
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


TOKENIZERS = {
    "bytes": made(bytewise),
    "llama 2": made(legacy_llama),
    "metaspace": made(metaspace),
    "tiny-llava": bundled("tiny-llava"),
    "words": in_vocabulary(words),
    "unigram": in_vocabulary(unigram),
    "merges": in_vocabulary(merged),
    "folding": looking_in(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
}
TEMPLATES = {
    "turns": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trims": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}",
    "joins": "{% for m in messages %}<|im_start|>{{ m['content'] | map(attribute='text') | map('trim') | join('') }}"
    "<|im_end|>{% endfor %}",
    "upper case": "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
    "lower case": "{% for m in messages %}{{ m['content'] | lower }}<|im_end|>{% endfor %}",
    "removes": "{% for m in messages %}{{ m['content'].replace('x', '').replace('\n', '') }}<|im_end|>{% endfor %}",
    "looks": "{% for m in messages %}{% if '<image>' in m['content'] or m['content'].startswith('<') %}seen{% endif %}"
    "{{ m['content'].replace('<image>', '') }}<|im_end|>{% endfor %}",
    "refuses": "{% for m in messages %}{% if '<image>' in m['content'] %}{{ raise_exception('no') }}{% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}",
    "brackets": "{% for m in messages %}<{{ m['content'] }}><|im_end|>{% endfor %}",
}
ODD = ("x", "<S>", "<IMAGE>", "＜ｓ＞", "ſ")  # become control tokens in another case or by compatibility
pieces = st.sampled_from(
    [
        *SPECIALS,
        "<tool_call>",
        "<ima",
        "ge>",
        "<",
        ">",
        "/s>",
        "s",
        " ",
        "\n",
        "the",
        "[",
        "\ue000",
        "é",
        "x",
        "<S>",
        "<IMAGE>",
        "＜ｓ＞",
        "ſ",
    ]
)
texts = st.lists(pieces | st.text(max_size=6), max_size=8).map("".join)
roles = st.sampled_from(["system", "user", "assistant"])


def model_of(tokenizer: Tokenizer) -> ModelInfo:
    return ModelInfo(
        family="llava", max_context=2000, vocab_size=tokenizer.get_vocab_size(),
        image_token_id=tokenizer.token_to_id("<image>"), n_parameters=1, dtype="float32", device="cpu",
        weights="fp32", kernels="avx2", block_tokens=16, n_blocks=100,
    )  # fmt: skip


def prompter(tokenizer: Tokenizer, template: str | None) -> Prompter:
    return Prompter(tokenizer, None if template is None else Template(template, {}), None)


def control(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return [i for i in ids if i in special and i != tokenizer.token_to_id("<unk>")]


PROMPTERS = {(t, s): prompter(TOKENIZERS[t], TEMPLATES[s]) for t in TOKENIZERS for s in TEMPLATES}


@pytest.mark.parametrize("place", list(PROMPTERS), ids=lambda place: f"{place[0]}, {place[1]}")
@settings(deadline=None, max_examples=15)
@given(said=st.lists(st.tuples(roles, texts), min_size=1, max_size=4))
def test_the_control_tokens_of_a_prompt_are_those_of_the_template(place, said) -> None:
    tokenizer, prompts = TOKENIZERS[place[0]], PROMPTERS[place]
    ids = prompts.chat([Turn(role, text) for role, text in said], model_of(tokenizer))
    blank = prompts.chat([Turn(role, "x") for role, _ in said], model_of(tokenizer))
    assert control(tokenizer, ids) == control(tokenizer, blank)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(deadline=None, max_examples=40)
@given(parts=st.lists(texts | st.none(), min_size=1, max_size=6))
def test_placeholders_are_our_own_however_text_is_split(name, parts) -> None:
    tokenizer, prompts = TOKENIZERS[name], PROMPTERS[name, "turns"]
    content = [PicturePlace() if part is None else MessageText(part) for part in parts]
    ids = prompts.chat([Turn("user", content)], model_of(tokenizer))
    assert ids.count(tokenizer.token_to_id("<image>")) == parts.count(None)
    typed = "".join("<image>" if part is None else part for part in parts)
    if name in ("bytes", "tiny-llava"):  # the others add and strip spaces, or cannot spell every character
        said = tokenizer.decode(ids, skip_special_tokens=False)
        assert said == f"<|im_start|>user\n{typed}<|im_end|>\n<|im_start|>assistant\n" or name == "tiny-llava"


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(deadline=None, max_examples=40)
@given(text=texts, add=st.booleans())
def test_a_prompt_without_typed_tokens_is_encoded_as_ever(name, text, add) -> None:
    """Whether or not marks at the ends send the prompt to the second tokenizer."""
    tokenizer = TOKENIZERS[name]
    encoder = Encoder(tokenizer, [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special])
    if any(special in text for special in SPECIALS):
        text = text.replace("<", "(").replace("[", "(")
    if name == "folding":
        text = text.encode("ascii", "ignore").decode().lower().replace("<", "(").replace("[", "(")
    prompt = f"<|im_start|>{encoder.mark(text)}<|im_end|>"
    assert encoder.encode(prompt, add) == tokenizer.encode(f"<|im_start|>{text}<|im_end|>", add_special_tokens=add).ids
    assert encoder.plain(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(deadline=None, max_examples=40)
@given(text=texts)
def test_a_mark_keeps_length_and_comes_off(name, text) -> None:
    tokenizer = TOKENIZERS[name]
    encoder = Encoder(tokenizer, [t.content for t in tokenizer.get_added_tokens_decoder().values()])
    marked = encoder.mark(text)
    assert len(marked) == len(text) and encoder.unmark(marked) == text
    for whole in (marked, encoder.hide(text)):
        assert not any(token.content in whole for token in tokenizer.get_added_tokens_decoder().values())
        assert len(whole) == len(text) and encoder.unmark(whole) == text


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(deadline=None, max_examples=40)
@given(text=texts)
def test_questions_and_captions_hold_no_control_token(name, text) -> None:
    tokenizer, prompts = TOKENIZERS[name], PROMPTERS[name, "turns"]
    turns = [Turn("user", [PicturePlace(), MessageText(text)])]
    (caption,) = caption_ids(prompts.text_ids, turns)
    for ids in (caption, question_ids(prompts.text_ids, turns)):
        assert control(tokenizer, ids) == []


def test_the_prompt_of_a_completion_may_hold_control_tokens_but_no_placeholder() -> None:
    """The caller writes the template; vLLM reads such prompts in the same way. A typed <image> shows no picture."""
    tokenizer = TOKENIZERS["bytes"]
    ids = prompter(tokenizer, None).complete("<|im_start|>see <image></s>", model_of(tokenizer), "prompt")
    assert control(tokenizer, ids) == [tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("</s>")]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>see <image></s>"


@pytest.mark.parametrize(
    "text",
    [
        "<p><s>10</s></p>",
        "what is `<pad>`?",
        "<image>\nWhat is this?",
        "<speak><s>Hello</s></speak>",
        "[INST] hi [/INST]",
    ],
)
def test_what_people_type_reads_as_typed(text: str) -> None:
    tokenizer, prompts = TOKENIZERS["bytes"], PROMPTERS["bytes", "turns"]
    ids = prompts.chat([Turn("user", text), Turn("assistant", f"{text}</s>"), Turn("user", "on")], model_of(tokenizer))
    said = tokenizer.decode(ids, skip_special_tokens=False)
    assert said.startswith(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}</s><|im_end|>")


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)


def test_a_template_reads_the_answers_of_its_model() -> None:
    """Thinking models: "</think>" is a visible token that the template looks for in earlier answers, and only there."""
    tokenizer = made(bytewise)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    prompts, model = prompter(tokenizer, THINKS), model_of(tokenizer)
    turns = [Turn("user", "a</think>b"), Turn("assistant", "<think>so</think>yes</s>")]
    ids = prompts.chat(turns, model)
    said = tokenizer.decode(ids, skip_special_tokens=False)
    assert said == "<|im_start|>user\na</think>b<|im_end|>\n<|im_start|>assistant\nyes</s><|im_end|>\n"
    assert tokenizer.token_to_id("</think>") not in ids and tokenizer.token_to_id("</s>") not in ids


def test_the_reason_of_a_template_shows_what_was_typed() -> None:
    tokenizer = TOKENIZERS["bytes"]
    prompts = prompter(tokenizer, "{{ raise_exception('cannot read ' ~ messages[0]['content']) }}")
    with pytest.raises(ApiError, match="cannot read <s>1</s>"):
        prompts.chat([Turn("user", "<s>1</s>")], model_of(tokenizer))


def test_a_prompt_is_what_the_tokenizer_alone_makes() -> None:
    """Even where this tokenizer misses a control token of the template: the model has learned such prompts."""
    tokenizer = looking_in(normalizers.Prepend("\u2581"))
    ids = prompter(tokenizer, TEMPLATES["turns"]).chat([Turn("user", "see")], model_of(tokenizer))
    text = "<|im_start|>user\nsee<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(text).ids
    assert control(tokenizer, ids) != [tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<|im_start|>")]


def test_a_thousand_control_tokens_are_found_as_fast_as_one() -> None:
    tokenizer = made(bytewise)
    tokenizer.add_special_tokens([f"<|reserved_special_token_{i}|>" for i in range(1000)])
    encoder = Encoder(tokenizer, [token.content for token in tokenizer.get_added_tokens_decoder().values()])
    started = time.perf_counter()
    for text in ("<" * 100_000, "<|reserved_special_token_" * 4000, "[ <" * 33_000):
        assert encoder.unmark(encoder.mark(text)) == encoder.unmark(encoder.hide(text)) == text
    assert time.perf_counter() - started < 3.0


def test_a_placeholder_that_is_not_special_is_a_control_token_all_the_same() -> None:
    tokenizer = bytewise()
    tokenizer.add_tokens([AddedToken("<picture>", special=False)])
    placeholder = tokenizer.token_to_id("<picture>")
    model = msgspec.structs.replace(model_of(tokenizer), image_token_id=placeholder)
    prompts = prompter(tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    ids = prompts.chat([Turn("user", [MessageText("a <picture> of"), PicturePlace()])], model)
    assert ids.count(placeholder) == 1 and tokenizer.decode(ids) == "a <picture> of\n<picture>"
    assert placeholder not in prompts.complete("see <picture>", model, "prompt")


def test_added_tokens_of_white_space_and_words_are_ordinary_text() -> None:
    """Tokenizers of Gemma, Phi and GPT-NeoX add runs of white space; a template has them, too."""
    tokenizer = made(bytewise)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("\n\n", "    ", "user", "\u2581\u2581")])
    prompts = prompter(tokenizer, "{% if true %}\n\n    {% endif %}user\n\n{{ messages[0]['content'] }}<|im_end|>")
    typed = "user:\n\nif x:\n    \u2581\u2581y </s>"
    ids = prompts.chat([Turn("user", typed)], model_of(tokenizer))
    for text in ("\n\n", "    ", "user", "\u2581\u2581"):
        assert tokenizer.token_to_id(text) in ids
    assert tokenizer.token_to_id("</s>") not in ids
