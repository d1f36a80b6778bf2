"""Fields of other servers and of OpenAI's API that this server does not honour.

A field that changes the answer is refused by name, unless its value asks for nothing. Null always asks for nothing. A
field that cannot change the answer is accepted. Any other unknown field is ignored with a warning.

The names come from the request schemas of OpenAI, vLLM, SGLang, LMDeploy, llama.cpp, Text Generation Inference and
Ollama.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

Values = tuple[JsonValue, ...]
OFF: Values = (False, 0, "", [], {})  # what asks for nothing, where a field does not say otherwise


def _off(names: str) -> dict[str, Values]:
    return dict.fromkeys(names.split(), OFF)


def _no_effect(names: str) -> frozenset[str]:
    return frozenset(names.split())


@dataclass(frozen=True, slots=True)
class KnownFields:
    """Known fields of one object of a request.

    Attributes:
        refused: the values of each field that ask for nothing; any other value is refused.
        no_effect: fields that cannot change the answer.
        instead: the field of this server that a refused field stands for.
    """

    refused: Mapping[str, Values] = field(default_factory=dict)
    no_effect: frozenset[str] = frozenset()
    instead: Mapping[str, str] = field(default_factory=dict)

    def refuses(self, name: str, value: JsonValue) -> bool:
        """Whether this value of a field would change the answer."""
        legal = self.refused.get(name)
        return legal is not None and _stated(value) not in (None, *legal)

    def ignores(self, name: str, value: JsonValue) -> bool:
        """Whether a field is unknown and says something, so that the client must hear that nobody listens."""
        return value is not None and name not in self.refused and name not in self.no_effect


def _stated(value: JsonValue) -> JsonValue:
    """Leave out null members: client libraries write every optional member of an object."""
    if isinstance(value, dict) and len(value) < 16:
        return {key: each for key, each in value.items() if each is not None}
    return value


def merged(parts: Iterable[KnownFields]) -> KnownFields:
    """Join the fields of several tables; the later ones win."""
    refused: dict[str, Values] = {}
    instead: dict[str, str] = {}
    no_effect: frozenset[str] = frozenset()
    for part in parts:
        refused |= part.refused
        instead |= part.instead
        no_effect |= part.no_effect
    return KnownFields(refused, no_effect, instead)


_OTHER_NAMES = {
    # Values of these are counts or strengths; no value of them means nothing, so each is refused.
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_gen_len": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "request_output_len": "max_tokens",
    "min_new_tokens": "min_tokens",
    "min_length": "min_tokens",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stopping_strings": "stop",
    "stop_words": "stop",
    "num_return_sequences": "n",
    "num_completions": "n",
    "n_probs": "logprobs",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
}
_SAMPLING = KnownFields(
    refused={
        **_off(
            # Other samplers and other searches.
            "use_beam_search early_stopping penalty_alpha epsilon_cutoff eta_cutoff top_a min_keep mirostat "
            "mirostat_mode dynatemp_range dynamic_temperature xtc_probability dry_multiplier no_repeat_ngram_size "
            "smoothing_factor temperature_last sampler_priority samplers sampler_seq sampler_order penalty_prompt "
            "negative_prompt watermark watermarking logits_processors logits_processor custom_logit_processor "
            "custom_params vllm_xargs repetition_detection bad_words bad_words_ids sequence_bias banned_tokens "
            "custom_token_bans force_words_ids suppress_tokens exponential_decay_length_penalty "
            "thinking_token_budget thinking_budget reasoning_budget_tokens t_max_predict_ms max_time n_indent n_keep "
            "n_discard nvext session_params input_ids prompt_token_ids prompt_embeds inputs_embeds "
            # Constrained output.
            "guided_json guided_regex guided_choice guided_grammar guided_json_object structured_outputs "
            "structural_tag json_schema json_object regex ebnf grammar grammar_lazy grammar_triggers format "
            # Adapters and other models.
            "lora lora_path lora_name lora_request adapter_name adapter_id adapter_path adapters models "
            # What a prompt is made of.
            "tools functions documents chat_template chat_template_kwargs continue_final_message template raw "
            "mm_processor_kwargs media_io_kwargs multi_modal_data images_config image_data image_url images image "
            "videos video video_data audio audios audio_data max_dynamic_patch min_dynamic_patch use_audio_in_video "
            "web_search_options search_parameters plugins transforms safe_prompt options system instructions input "
            "system_prompt response_role task truncate truncation_side context_overflow_behavior interactive_mode "
            # What a reply holds.
            "return_token_ids return_tokens return_tokens_as_token_ids return_prompt_token_ids return_prompt_text "
            "return_hidden_states return_logprob return_meta_info return_routed_experts return_progress "
            "return_cached_tokens_details return_full_text top_logprobs_num logprob_start_len logprob_token_ids "
            "decoder_input_details details post_sampling_probs timings_per_token response_fields verbose "
            "include_stop_str_in_output no_stop_trim stop_regex echo suffix"
        ),
        **dict.fromkeys(_OTHER_NAMES, ()),
        "allowed_token_ids": (),
        "prompt_logprobs": (),  # 0 asks for the log-probabilities of the prompt without alternatives
        "truncate_prompt_tokens": (),
        "thinking": (*OFF, {"type": "disabled"}, "disabled"),
        "think": OFF,
        "enable_thinking": OFF,
        "chat_template_kwargs": (*OFF, {"enable_thinking": False}, {"thinking": False}),
        "tool_choice": ("", "none", "auto", {"type": "none"}, {"type": "auto"}),
        "function_call": ("", "none", "auto"),
        "response_format": ("", "text", {}, {"type": "text"}),
        "modalities": ([], ["text"]),
        "repeat_penalty": (1,),
        "frequency_penalty_range": OFF,
        "typical_p": (0, 1),
        "typical": (0, 1),
        "tfs": (0, 1),
        "tfs_z": (0, 1),
        "top_n_sigma": (-1, 0),
        "nsigma": (-1, 0),
        "length_penalty": (1,),
        "diversity_penalty": (0,),
        "num_beams": (0, 1),
        "num_beam_groups": (0, 1),
        "beam_width": (0, 1),
        "guidance_scale": (0, 1),
        "encoder_repetition_penalty": (0, 1),
        "do_sample": (True,),
        "n_probs": (0,),
        "do_preprocess": (True,),
        "detokenize": (True,),
        "skip_special_tokens": (True,),
        "ban_eos_token": (False,),
        "add_bos_token": (True,),
        # A client that puts them into the body means the members that its library would have sent.
        "extra_body": (),
        "extra_headers": (),
        "extra_query": (),
    },
    no_effect=_no_effect(
        # Storage, billing, names, routing and speed.
        "store metadata service_tier prediction prompt_cache_key prompt_cache_options prompt_cache_retention "
        "safety_identifier parallel_tool_calls parse_tool_calls priority request_id rid session_id extra_key "
        "custom_labels ngram_corpus_id bootstrap_host bootstrap_port bootstrap_room routed_dp_rank "
        "disagg_prefill_dp_rank data_parallel_rank kv_transfer_params ec_transfer_params routed_experts_prompt_start "
        "routed_experts_start_len cache_prompt id_slot keep_alive stream_interval usage cancel "
        # Without a field that is refused they have nothing to act on.
        "mirostat_tau mirostat_eta dynatemp_exponent dynatemp_low dynatemp_high xtc_threshold dry_base "
        "dry_allowed_length dry_penalty_last_n dry_sequence_breakers repeat_last_n penalize_nl smoothing_curve "
        "guided_decoding_backend guided_whitespace_pattern return_token_offsets return_mm_kwargs "
        # The server's answers have no reasoning part, and no special tokens between which there could be spaces.
        "include_reasoning separate_reasoning stream_reasoning reasoning_format spaces_between_special_tokens"
    ),
    instead={
        **_OTHER_NAMES,
        "do_sample": "temperature",
        "system": "messages",
        "system_prompt": "messages",
        "instructions": "messages",
        "input": "messages",
        "images": "messages",
        "image": "messages",
        "image_data": "messages",
    },
)
CHAT = merged(
    [
        _SAMPLING,
        KnownFields(
            refused={
                "add_generation_prompt": (True,),
                "add_special_tokens": (False,),
                "prompt": OFF,
                "best_of": (1,),
            },
            instead={"prompt": "messages"},
        ),
    ]
)
COMPLETION = merged(
    [
        _SAMPLING,
        KnownFields(
            refused={
                "add_special_tokens": (True,),
                "max_completion_tokens": (),
                "messages": OFF,
                "top_logprobs": OFF,
            },
            no_effect=_no_effect("best_of add_generation_prompt"),  # `checks` compares best_of with n
            instead={"max_completion_tokens": "max_tokens", "messages": "prompt", "top_logprobs": "logprobs"},
        ),
    ]
)
TOKENIZE = KnownFields(
    refused={
        name: _SAMPLING.refused[name]
        for name in (
            "tools functions documents chat_template chat_template_kwargs continue_final_message mm_processor_kwargs "
            "media_io_kwargs truncate_prompt_tokens extra_body"
        ).split()
    }
    | {"content": OFF, "text": OFF, "add_special": (), "with_pieces": (False,)},
    no_effect=_no_effect("user request_id return_token_offsets"),
    instead={
        "content": "prompt",
        "text": "prompt",
        "add_special": "add_special_tokens",
        "with_pieces": "return_token_strs",
    },
)
DETOKENIZE = KnownFields(
    refused={"token_ids": (), "ids": (), "skip_special_tokens": (False,)},
    no_effect=_no_effect("user request_id"),
    instead={"token_ids": "tokens", "ids": "tokens"},
)
MESSAGE = KnownFields(
    refused=_off("tool_calls function_call tool_call_id audio refusal prefix partial tools documents images"),
    no_effect=_no_effect("id object created status type index weight annotations cache_control metadata usage"),
)
TEXT_PART = KnownFields(no_effect=_no_effect("id annotations cache_control logprobs"))
IMAGE_PART = KnownFields(
    refused=_off(
        "min_pixels max_pixels total_pixels resized_height resized_width max_dynamic_patch min_dynamic_patch image "
        "image_embeds video"
    )
    | {"modalities": ("image", ["image"], "multi-images")},
    no_effect=_no_effect("id uuid name cache_control"),
)
IMAGE_URL = KnownFields(
    refused=_off("min_pixels max_pixels max_dynamic_patch min_dynamic_patch"),
    no_effect=_no_effect("id uuid name format content_hash cache_control"),
)
STREAM_OPTIONS = KnownFields(
    refused=_off("continuous_usage_stats include_logprobs"), no_effect=_no_effect("include_obfuscation chunk_size")
)
