"""The tokenizer of the random models, and prompts of an exact number of tokens.

The tokenizer is a real byte-level BPE, because every peer reads the file with its own reader. Letters merge to pairs,
pairs merge to four-letter words, and a chosen set of these words fills the vocabulary. So a word is one token, and
counts are arithmetic.
"""

import json
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import foveate

_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
N_SILENT = len(_SPECIALS) + 256  # ids that do not show as text of their own: specials, then single bytes
_PAIRS = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
_BUNDLED = {"llava": "tiny-llava", "qwen2_vl": "tiny-qwen2-vl"}


def chat_template(family: str) -> str:
    """Jinja source of the bundled models. `family` is "llava" or "qwen2_vl"."""
    return (Path(foveate.__file__).parent / "bundled" / _BUNDLED[family] / "chat_template.jinja").read_text()


@cache
def _words(n: int) -> list[str]:
    """`n` four-letter words, the same ones on every machine."""
    words = [a + b for a, b in product(_PAIRS, repeat=2) if min(a, b) < a[1] + b[0]]  # else the middle merges first
    Random(0).shuffle(words)
    return words[:n]


def build_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE with exactly `vocab` ids: specials, bytes, pairs of letters, then words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    n_pairs = min(len(_PAIRS), vocab - N_SILENT)
    words = _words(vocab - N_SILENT - n_pairs) if n_pairs == len(_PAIRS) else []
    pieces = [*_SPECIALS, *letters, *_PAIRS[:n_pairs], *words]
    merges = [(pair[0], pair[1]) for pair in _PAIRS[:n_pairs]] + [(word[:2], word[2:]) for word in words]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIALS])
    assert core.get_vocab_size() == vocab, "every id has a text"
    return core


def write_tokenizer(folder: Path, family: str, vocab: int, context: int) -> None:
    """Write tokenizer.json, its config and the chat template."""
    build_tokenizer(vocab).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor" if family == "llava" else "Qwen2VLProcessor",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": chat_template(family),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "chat_template.jinja").write_text(chat_template(family))


def text_of(n_tokens: int, seed: int) -> str:
    """Text that encodes to exactly `n_tokens`: a word, a space and a question mark are one token each."""
    words = _words(20_000)  # all of them in the vocabulary of 32,000
    draw = Random(seed)
    text = " ".join(draw.choice(words) for _ in range((n_tokens + 1) // 2))
    return text if n_tokens % 2 else text + "?"


def rendered(family: str, text: str, picture: bool) -> str:
    """One turn as the chat template renders it, for libraries that take the prompt."""
    visual = {"llava": "<image>\n", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}[family]
    return f"<|im_start|>user\n{visual if picture else ''}{text}<|im_end|>\n<|im_start|>assistant\n"
