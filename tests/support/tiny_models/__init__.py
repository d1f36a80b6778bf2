"""Random tiny checkpoints on disk, and what `transformers` answers for them.

Everything is float32 and seeded. Tests get the package as a fixture:

    def test_x(tiny_models, tmp_path):
        tiny_models.save_llava(tmp_path, vision="clip", decoder="llama", n_kv_heads=2)
        logits = tiny_models.reference_logits(tmp_path, prompt_ids, pictures)
"""

from tiny_models.common import IMAGE_TOKEN, VOCAB
from tiny_models.engine import greedy, logprobs, sent
from tiny_models.llava import save_llava, save_tiled
from tiny_models.prompts import picture, prompt
from tiny_models.qwen import save_qwen
from tiny_models.reference import load_reference, reference_greedy, reference_inputs, reference_logits

__all__ = [
    "IMAGE_TOKEN",
    "VOCAB",
    "greedy",
    "load_reference",
    "logprobs",
    "picture",
    "prompt",
    "reference_greedy",
    "reference_inputs",
    "reference_logits",
    "save_llava",
    "save_qwen",
    "save_tiled",
    "sent",
]
