"""The messages between server and engine process: msgspec structs, so that no pickle is ever read.

Server to engine: `Generate`, `Abort`, `Shutdown`. Engine to server: `Ready`, then per step a list of
`Accepted`, `Delta`, `Failed` and now and then a `Heartbeat`, and every second a `Pulse`. Every accepted request ends
with exactly one `Delta` with `finish` per choice, or one `Failed`. Imports no torch: the server reads this file too.
"""

from msgspec import Struct

TO_ENGINE, FROM_ENGINE = "to_engine", "from_engine"  # sockets, in a directory of the server


class Stage(Struct, frozen=True, kw_only=True):
    """One method of a composition such as pixelprune+divprune."""

    method: str
    params: dict[str, bool | int | float | str] = {}
    keep: float | None = None  # share kept of what the stage is given, in (0, 1]; None: even steps to the budget


class VisualBudget(Struct, frozen=True, kw_only=True):
    """How many visual tokens a request may put before the language model, resolved by the server.

    The smallest of `tokens`, the sum of per-image caps, and `ratio` wins, but never fewer than `floor`.
    """

    tokens: int | None = None  # total over all images; None: no cap
    fit: bool = True  # compress (down to `floor`) rather than refuse when the prompt would not fit; "full" turns it off
    per_image: int | None = None  # cap per image; None: no cap
    ratio: float = 1.0  # of the tokens offered, in (0, 1]
    floor: int = 1  # total; clamped to what the images offer
    method: str = "foveal"  # a file of engine/reduce/methods
    params: dict[str, bool | int | float | str] = {}  # fields of that method
    stages: list[Stage] = []  # of a composition, in order; then `method` is its text and `params` is empty
    split: str = "area"  # a file of engine/reduce/split: how several images, or tiles, share the budget
    prune: Stage | None = None  # a file of engine/prune/methods, acting inside the decoder on what the reducers leave
    enter: float | None = None  # share of the tokens offered that enter the decoder; None: as many as the budget

    @property
    def label(self) -> str:
        """All its methods, as the answer repeats them."""
        if self.prune is None:
            return self.method
        return self.prune.method if self.method == "none" else f"{self.method}+{self.prune.method}"


class Image(Struct, frozen=True, kw_only=True):
    """One picture, already oriented, flattened to RGB and resized, or cut into tiles, by `engine.preprocess`."""

    pixels: bytes  # uint8 [height, width, 3]
    height: int
    width: int
    digest: bytes  # 32 bytes over pixels, shapes and processor settings; made by the server, never by a client
    tokens: int | None = None  # cap of this image alone
    ratio: float | None = None  # cap of this image alone, as a share of what it offers
    original: tuple[int, int] | None = None  # (height, width); then the pixels are its tiles, one above the other
    caption_ids: list[int] = []  # the user's text that follows it, up to the next image; for methods that read it


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How tokens are drawn. Ranges are checked by the server; noise is a function of (seed, choice, output index)."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = None  # None: up to the context
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives per token; 0: only the chosen one; None: none


class Generate(Struct, frozen=True, kw_only=True, tag=True):
    """One request. `prompt_ids` holds one image placeholder per image; the engine expands it to the kept count."""

    id: str
    prompt_ids: list[int]
    images: list[Image] = []
    visual: VisualBudget = VisualBudget()
    sampling: SamplingParams = SamplingParams()
    n: int = 1  # choices
    salt: bytes = b""  # the tenant's namespace in the prefix cache and in the feature cache
    prefix_salt: bytes = b""  # a further namespace in the prefix cache alone: features are shared
    question_ids: list[int] = []  # what the user asks, without template; for methods that read it
    explain: str = ""  # "kept_map": say which tokens survived; the prompt is then not looked up in the prefix cache


class Abort(Struct, frozen=True, tag=True):
    """End a request, or one choice of it; each choice still ends with a `Delta`, and its usage."""

    id: str
    choice: int | None = None  # None: all of them


class Shutdown(Struct, frozen=True, tag=True):
    pass


class ImageUsage(Struct, frozen=True, kw_only=True):
    offered: int  # visual tokens an unpruned run would read
    kept: int
    rows: int  # grid of the offered tokens; with tiles, of the crops side by side
    cols: int


class VisualUsage(Struct, frozen=True, kw_only=True):
    offered: int = 0
    kept: int = 0  # enter the decoder
    mean: float = 0.0  # in a layer of the decoder, on average
    layers: list[tuple[int, int]] = []  # (first layer of a group, visual tokens in it), if some leave on the way
    method: str = "none"
    per_image: list[ImageUsage] = []


class Accepted(Struct, frozen=True, kw_only=True, tag=True):
    """Sent once, before anything is encoded: counts are known from geometry and budget alone."""

    id: str
    prompt_tokens: int  # after reduction: what the scheduler admits and what fills blocks
    visual: VisualUsage


class TokenLogprob(Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # most likely first


class Usage(Struct, frozen=True, kw_only=True):
    """What one choice spent, known at its end."""

    cached_tokens: int  # prompt tokens found in the prefix cache
    output_tokens: int
    encoder_hits: int  # images whose features were cached
    preemptions: int
    queue_s: float
    encode_s: float
    reduce_s: float
    prefill_s: float
    decode_s: float
    peak_kv_tokens: int
    kept: list[list[int]] = []  # tokens of each image that survived, if the request asked


class Delta(Struct, frozen=True, kw_only=True, tag=True):
    """New tokens of one choice; `usage` comes with `finish`."""

    id: str
    choice: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None  # "stop", "length" or "abort"
    stop_token: int | None = None  # which token stopped it; it is the last of token_ids
    usage: Usage | None = None


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    id: str
    code: str  # of engine.errors, or "internal_error"
    message: str
    param: str | None = None


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What the server must know of the model it fronts."""

    family: str
    max_context: int
    vocab_size: int
    image_token_id: int
    n_parameters: int
    dtype: str
    weights: str  # how the decoder's matrices are held: fp32, bf16, int16, int8, int4
    kernels: str  # the level in force (kernels/cpu/levels.py); "torch" on CUDA
    device: str
    block_tokens: int
    n_blocks: int
    cache_mb: int = 0  # of the KV pool


class FieldInfo(Struct, frozen=True, kw_only=True):
    """One setting of a method."""

    name: str
    type: str  # "int", "float", "bool", "str", or the legal words: '"a" | "b"'
    default: bool | int | float | str


class MethodInfo(Struct, frozen=True, kw_only=True):
    """One file of engine/reduce or engine/prune, for GET /v1/vlm/methods: to import those takes torch."""

    name: str
    summary: str  # first line of the file's docstring
    source: str  # the paper; empty for a plain baseline
    fields: list[FieldInfo]
    question_aware: bool  # reads the question
    shared: bool  # what it keeps of a picture serves every prompt about that picture
    signals_cls: list[str]  # what it taps in an encoder with a CLS row
    signals_no_cls: list[str]  # and in one without
    fits: str = "any"  # encoders it is for: "any", "cls", "no_cls" or "tiles"
    stage: str = "tokens"  # where: "pixels" (before the tower), "encoder" (inside), "tokens" (after), "decoder" (in it)
    first_only: bool = False  # needs the whole grid, so in a composition it comes before every other of its stage
    restores: bool = False  # with a stage after it, it leaves all rows of the picture in the end


class Ready(Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded and one real step has run."""

    model: ModelInfo
    methods: list[MethodInfo] = []  # filled by engine.methods.describe


class Heartbeat(Struct, frozen=True, kw_only=True, tag=True):
    """State for /metrics and readiness; sent every second, also when idle. Counters never decrease."""

    since_step_s: float  # since the last real step ended
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    total_blocks: int
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    visual_offered: int
    visual_kept: int
    images_encoded: int
    encoder_hits: int


class Pulse(Struct, frozen=True, kw_only=True, tag=True):
    """A sign of life, sent every second by a thread of its own, also during a step.

    The main thread takes turns: it reads messages, runs at most one step, and sends events. A turn without a step takes
    a second at most, so a longer turn is a long step.
    """

    turns: int  # begun since `Ready`; progress if the number rises
    turn_s: float  # since the turn in progress began


ToEngine = Generate | Abort | Shutdown
FromEngine = Ready | Accepted | Delta | Failed | Heartbeat | Pulse
