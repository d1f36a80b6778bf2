"""Every setting, its default and its range. Values are final once built; computed values live elsewhere."""

import re
from dataclasses import dataclass, field
from typing import Literal

from foveate.configs.errors import ConfigError

IMAGE_FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://(\*\.)?([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:(\*|\d+))?")


def _positive(key: str, value: float, unit: str = "") -> None:
    if value <= 0:
        raise ConfigError(f"{key}: {value}{unit} is not positive")


def _ratio(key: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"{key}: {value} is not in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model and the storage of its weights."""

    path: str = "tiny-llava"  # a bundled name, a local Hugging Face directory, or a hub name
    name: str = ""  # in replies and metrics; empty: the last part of the path, and the path is an alias
    aliases: tuple[str, ...] = ()  # more names that requests may use
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if the hardware has native bfloat16
    # Format of matrices on the CPU. auto: the least memory without loss; int16 for dtype bfloat16 if the hardware lacks
    # native bfloat16. Any checkpoint is quantized at load. int8 and int4 apply to the decoder only.
    weights: Literal["auto", "fp32", "bf16", "int16", "int8", "int4"] = "auto"
    quantize: tuple[str, ...] = ("head",)  # other parts stored in int8 by int8 and int4: head, embeddings, tower
    threads: int = 0  # CPU threads; 0: all that this process may use, or one for a model under 30 M parameters
    max_context: int = 0  # tokens of prompt and answer; 0: the checkpoint's value
    # Sampling of requests that leave it out. auto: by the checkpoint's generation_config.json; ignore: neutral values
    generation_config: Literal["auto", "ignore"] = "auto"

    def __post_init__(self) -> None:
        for part in self.quantize:
            if part not in ("head", "embeddings", "tower"):
                raise ConfigError(f"model.quantize: {part!r} is none of head, embeddings, tower")
        if not all(self.aliases):
            raise ConfigError("model.aliases: a name is empty; leave it out")
        if self.threads < 0:
            raise ConfigError(f"model.threads: {self.threads} is negative; 0 means automatic")
        if self.max_context < 0:
            raise ConfigError(f"model.max_context: {self.max_context} is negative; 0 means as the checkpoint says")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The memory and the block size of the KV cache."""

    block_tokens: int = 16  # tokens in one block; a power of two, so slot = id * block + offset is a shift
    memory_mb: int = 0  # size of the KV pool; 0: `memory_fraction` of the free memory on a GPU, 256 on a CPU
    memory_fraction: float = 0.90  # of *free* device memory after the weights are loaded
    prefix_sharing: bool = True

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.block_tokens & (self.block_tokens - 1):
            raise ConfigError(f"cache.block_tokens: {self.block_tokens} is not a power of two")
        if self.memory_mb < 0:
            raise ConfigError(f"cache.memory_mb: {self.memory_mb} is negative; 0 means automatic")
        _ratio("cache.memory_fraction", self.memory_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """The limits of one step."""

    max_running: int = 64  # sequences in one batch
    max_waiting: int = 1024  # queued requests before the server refuses new requests
    step_tokens: int = 2048  # rows of the language model per step
    chunk_tokens: int = 512  # tokens of one prompt per step
    encode_patches: int = 1024  # rows of the vision tower per step; one image always fits

    def __post_init__(self) -> None:
        for key in ("max_running", "max_waiting", "step_tokens", "chunk_tokens", "encode_patches"):
            _positive(f"scheduler.{key}", getattr(self, key))
        if self.step_tokens < self.max_running:
            raise ConfigError(
                f"scheduler.step_tokens: {self.step_tokens} is less than scheduler.max_running {self.max_running}: "
                "running decodes would starve"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The encode stage."""

    feature_cache_mb: int = 256  # encoder features kept for repeated images

    def __post_init__(self) -> None:
        _positive("vision.feature_cache_mb", self.feature_cache_mb)


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """The default visual budget of requests, and the bounds of stated budgets."""

    method: str = "foveal"  # as VLM-Visual-Method; reducers act if the budget is below the offered tokens
    tokens: int = 0  # default total per request; 0: no cap
    ratio: float = 1.0  # default share of the offered tokens
    floor: int = 1  # default minimum number of visual tokens per request
    max_tokens: int = 0  # hard cap per request; larger requested budgets are clamped; 0: no cap
    low_detail_ratio: float = 0.25  # share of tokens kept for `image_url.detail: low`

    def __post_init__(self) -> None:
        _ratio("budget.ratio", self.ratio)
        _ratio("budget.low_detail_ratio", self.low_detail_ratio)
        _positive("budget.floor", self.floor)
        for key in ("tokens", "max_tokens"):
            if getattr(self, key) < 0:
                raise ConfigError(f"budget.{key}: {getattr(self, key)} is negative; 0 means no cap")


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig:
    """The upper bounds of a request. Every integer of the API has its bound here."""

    body_mb: int = 64
    text_mb: int = 4  # a body without its data URLs
    body_values: int = 200_000  # names and values of a body; a prompt of token ids has as many as tokens
    images: int = 16
    image_mb: int = 40  # encoded bytes of one image
    # Checked in the header, before decoding. A worker holds at most 20 bytes for each of these pixels. A JPEG above the
    # limit is decoded at a half, a quarter or an eighth of its width and height, up to `jpeg_pixels`.
    image_pixels: int = 40_000_000
    jpeg_pixels: int = 256_000_000
    image_formats: tuple[str, ...] = ("png", "jpeg", "webp", "gif")  # of png, jpeg, webp, gif, bmp, tiff
    choices: int = 16  # n
    logprobs: int = 20
    stop_strings: int = 16
    stop_chars: int = 256
    output_tokens: int = 32_768  # of one answer; a larger max_tokens is an upper bound and means this
    fetch_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        for key in self.__slots__:
            if key != "image_formats":
                _positive(f"limits.{key}", getattr(self, key))
        for name in self.image_formats:
            if name not in IMAGE_FORMATS:
                raise ConfigError(f"limits.image_formats: {name!r} is none of {', '.join(IMAGE_FORMATS)}")
        if not self.image_formats:
            raise ConfigError(f"limits.image_formats: empty; name some of {', '.join(IMAGE_FORMATS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = 8000
    image_urls: bool = False  # fetch http(s) image URLs; data URLs always work
    image_url_hosts: tuple[str, ...] = ()  # hosts that may be fetched; empty: any public address
    decode_workers: int = 2  # threads that fetch, decode and resize images
    api_keys: tuple[str, ...] = ()  # empty: no authentication
    cors_origins: tuple[str, ...] = (
        "http://localhost:*",
        "https://localhost:*",
        "http://127.0.0.1:*",
        "http://[::1]:*",
    )  # pages of origins that may use the server; :* is any port, *. any subdomain, * alone any page
    drain_s: float = 30.0  # time for open requests to finish after SIGTERM or Ctrl-C
    engine_hang_s: float = 30.0  # an engine process that shows no sign of life for so long is killed and restarted
    engine_step_s: float = 600.0  # as is an engine process that is in one step for so long
    engine_deaths: int = 3  # deaths of the engine process, without 300 s of service in between, that end the server
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_requests: bool = True  # one line per request at level info, without content

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"server.port: {self.port} is not in 0..65535; 0 picks a free port")
        _positive("server.decode_workers", self.decode_workers)
        if self.drain_s < 0:
            raise ConfigError(f"server.drain_s: {self.drain_s} is negative; 0 cuts open requests off at once")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"server.cors_origins: {origin!r} is no origin; write https://app.example, without a path, or *"
                )
        for number, key in enumerate(self.api_keys):
            if not key or key != key.strip() or any(ord(char) < 32 or ord(char) == 127 for char in key):
                raise ConfigError(
                    f"server.api_keys: key {number} is empty, or holds control characters or outer blanks, which no "
                    "Authorization header carries; choose another key"
                )
        for key, least_s in (("engine_hang_s", 3.0), ("engine_step_s", 10.0)):
            if not getattr(self, key) >= least_s:
                raise ConfigError(f"server.{key}: {getattr(self, key)} is less than {least_s:.0f} seconds; raise it")
        _positive("server.engine_deaths", self.engine_deaths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings that `--set a.b=c` and `--config FILE` can change."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
