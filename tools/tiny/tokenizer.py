"""The shared tokenizer of the bundled models, and their chat templates.

The tokenizer is byte-level and can encode every text. The words of questions and answers are single tokens. All other
text, including words and numbers in the images, is encoded character by character, so that reading is copying glyphs.
"""

from collections import Counter

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.bundled import scenes

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END, TURN, TURN_END, "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part -%}
IMAGE
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant{{ '\\n' }}
{%- endif -%}
"""

IMAGE_MARKUP = {"llava": "{{ '<image>\\n' }}", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}


def chat_template(family: str) -> str:
    """Return the Jinja source of the chat template of "llava" or "qwen2_vl"."""
    return _TEMPLATE.replace("IMAGE", IMAGE_MARKUP[family])


def _split() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}\p{N}]|\s"), "isolated")
    return pre_tokenizers.Sequence([digits, words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _vocabulary(split: pre_tokenizers.PreTokenizer, samples: int = 3000) -> list[str]:
    """Return the words of generated conversations as byte-level pieces. Text in images enters only as characters."""
    counts: Counter[str] = Counter()
    for seed in range(samples):
        for question in scenes.questions(scenes.make_scene(seed), 0):
            for text in (question.text, question.answer, " " + question.answer):
                counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    counts.update({"user": 1000, "assistant": 1000, "system": 1000})
    written = set(scenes.WORDS)
    words = [p for p, n in counts.items() if n >= 20 and len(p) > 1 and p.removeprefix("Ġ") not in written]
    plain = {p.removeprefix("Ġ") for p in words} | {*scenes.COLOURS, *scenes.SHAPES}
    words += [form for p in plain for form in (p, "Ġ" + p) if len(p) > 1]
    return sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(set(words))


def build(family: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer with the family's chat template. Special tokens come first in the vocabulary."""
    split = _split()
    vocabulary = {piece: index for index, piece in enumerate([*SPECIALS, *_vocabulary(split)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=None,
        eos_token=TURN_END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = chat_template(family)
    return tokenizer
