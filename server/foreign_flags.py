"""Flags of other servers, and what does the same here. `foveate serve` names the remedy when a user tries one."""

SETTINGS = {  # flag: the setting that does the same
    "--allowed-media-domains": "server.image_url_hosts",
    "--block-size": "cache.block_tokens",
    "--chunked-prefill-size": "scheduler.chunk_tokens",
    "--context-length": "model.max_context",
    "--ctx-size": "model.max_context",
    "--device": "model.device",
    "--dtype": "model.dtype",
    "--enable-prefix-caching": "cache.prefix_sharing",
    "--gpu-memory-utilization": "cache.memory_fraction",
    "--kv-cache-memory-bytes": "cache.memory_mb",
    "--limit-mm-per-prompt": "limits.images",
    "--log-level": "server.log_level",
    "--max-logprobs": "limits.logprobs",
    "--max-model-len": "model.max_context",
    "--max-num-batched-tokens": "scheduler.step_tokens",
    "--max-num-seqs": "scheduler.max_running",
    "--max-queued-requests": "scheduler.max_waiting",
    "--max-running-requests": "scheduler.max_running",
    "--mem-fraction-static": "cache.memory_fraction",
    "--mm-processor-cache-gb": "vision.feature_cache_mb",
    "--no-enable-prefix-caching": "cache.prefix_sharing",
    "--page-size": "cache.block_tokens",
    "--quantization": "model.weights",
    "--threads": "model.threads",
    "--uvicorn-log-level": "server.log_level",
    "-q": "model.weights",
}
REMEDIES = {  # flag: what to do instead
    **dict.fromkeys(("--model", "--model-path"), "write the model without a flag: foveate serve MODEL"),
    **dict.fromkeys(
        ("--tensor-parallel-size", "--tp-size", "--tp", "-tp", "--pipeline-parallel-size", "--data-parallel-size"),
        "a server uses one device; leave the flag out",
    ),
    "--trust-remote-code": "the server runs no code of a checkpoint; leave the flag out",
    **dict.fromkeys(("--enable-lora", "--lora-modules"), "there is no LoRA; merge the adapter into the checkpoint"),
    "--max-tokens": "requests state max_tokens; the upper bound is --set limits.output_tokens=VALUE",
}


def remedy(words: list[str]) -> str:
    """Return what replaces the first foreign flag among the words of a command line. Empty if there is none."""
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in SETTINGS:
            return f"write --set {SETTINGS[flag]}=VALUE"
        if flag in REMEDIES:
            return REMEDIES[flag]
    return ""
