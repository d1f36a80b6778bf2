"""Run pairs through an engine in this process. Budgets resolve exactly as in a server with the same settings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from foveate.configs.config import BudgetConfig, Config
from foveate.configs.errors import ConfigError
from foveate.engine.common import (
    Accepted,
    Delta,
    Failed,
    Generate,
    Image,
    MethodInfo,
    ModelError,
    SamplingParams,
    TokenLogprob,
    VisualUsage,
)
from foveate.engine.engine import Engine
from foveate.engine.methods import describe
from foveate.engine.models.family import Family
from foveate.engine.models.parts.layers import Matrix
from foveate.engine.process import load
from foveate.server.common.errors import ApiError
from foveate.server.prepare.budget import ImageCap, ImageWish, resolve
from foveate.server.prepare.conversation import MessageText, PicturePlace, Turn
from foveate.server.prepare.media import Media
from foveate.server.prepare.prompt import Prompter
from foveate.server.prepare.question import caption_ids, question_ids
from foveate.server.prepare.stages import read_method
from foveate.tune.data import Pair


@dataclass(frozen=True, slots=True)
class Asked:
    """A pair in the engine's format."""

    prompt_ids: list[int]
    image: Image
    question_ids: list[int]
    answer: str | None  # the right answer
    where: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The engine's answer and its cost."""

    token_ids: tuple[int, ...]
    n_text: int  # text tokens of the prompt
    visual: VisualUsage
    logprobs: tuple[TokenLogprob, ...] = ()

    def by_layer(self, n_layers: int) -> list[int]:
        """Return the number of visual tokens in each decoder layer."""
        groups = self.visual.layers or [(0, self.visual.kept)]
        return [[n for first, n in groups if first <= layer][-1] for layer in range(n_layers)]


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The multiplications of one decoder layer."""

    n_weights: int  # weights of the layer's matrices
    width: int  # heads x head size; attention does 2 * width multiplications per pair of tokens

    def prefill_flops(self, n: int) -> int:
        """Return the FLOPs of a prefill of n tokens."""
        return 2 * self.n_weights * n + 2 * self.width * n * (n + 1)


class Asker:
    """One model and one engine.

    Args:
        config: as returned by `find_model`.

    Raises:
        ConfigError: the model cannot be loaded, or has no chat template.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        try:
            model = load(config)
        except ModelError as error:
            raise ConfigError(str(error)) from None
        assert isinstance(model, Family), "what the loader makes has a decoder"
        self.model = model
        self.methods: list[MethodInfo] = describe()
        self.prompter = Prompter.load(directory)
        self._config = config
        self._engine = Engine(model, config)
        self._info = self._engine.info()
        self._limit = min(config.scheduler.max_waiting, 2 * config.scheduler.max_running)
        spec, block = model.spec, model.language_model.layers[0]
        weights = sum(m.n_in * m.n_out for m in block.modules() if isinstance(m, Matrix))
        self.layer = LayerCost(weights, spec.n_heads * spec.head_dim)

    def prepare(self, pairs: Sequence[Pair]) -> list[Asked]:
        """Decode and resize the images, render and tokenize the prompts. Raises ConfigError, naming the pair."""
        config = self._config
        media = Media(self.model.processor, config.limits, config.server.decode_workers, None)
        images: dict[bytes | str, Image] = {}
        try:
            for pair in pairs:
                if pair.picture not in images:
                    images[pair.picture] = media.read(pair.picture, "image", ImageCap(), 1)
        except ApiError as error:
            raise ConfigError(f"{pair.where}: {error.message}") from None
        finally:
            media.close()
        return [self._asked(pair, images[pair.picture]) for pair in pairs]

    def check_method(self, text: str) -> MethodInfo:
        """Check a value of `budget.method`. Return the info of the last stage. Raises ConfigError."""
        try:
            read_method("budget.method", text, self.methods)
        except ApiError as error:
            raise ConfigError(error.message) from None
        name = text.rpartition("+")[2].partition(";")[0].strip()
        return next(method for method in self.methods if method.name == name)

    def ask(
        self, asked: Sequence[Asked], method: str, ratio: float, max_tokens: int, logprobs: int | None = None
    ) -> list[Outcome]:
        """Return greedy answers under `budget.method` and `budget.ratio`, in order.

        Calls share only image features. The prefix cache of one method and ratio is separate from all others.

        Raises:
            ConfigError: the engine refuses a pair. The message names the pair.
        """
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=logprobs)
        salt = f"{method} {ratio}".encode()
        queue = iter([(i, self._generate(i, one, method, ratio, sampling, salt)) for i, one in enumerate(asked)])
        tokens: list[list[int]] = [[] for _ in asked]
        details: list[list[TokenLogprob]] = [[] for _ in asked]
        accepted: dict[int, Accepted] = {}
        for event in self._events(queue):
            i = int(event.id)
            match event:
                case Accepted():
                    accepted[i] = event
                case Failed():
                    raise ConfigError(f"{asked[i].where}: {method} at {ratio:g}: {event.message}")
                case Delta():
                    tokens[i] += event.token_ids
                    details[i] += event.logprobs or []
        return [
            Outcome(tuple(tokens[i]), known.prompt_tokens - known.visual.kept, known.visual, tuple(details[i]))
            for i, known in sorted(accepted.items())
        ]

    def text(self, token_ids: Sequence[int]) -> str:
        """Decode the text of an answer."""
        text: str = self.prompter.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text.strip()

    def _events(self, queue: Iterator[tuple[int, Generate]]) -> Iterator[Accepted | Delta | Failed]:
        n_open, left = 0, True
        while left or self._engine.has_work:
            while left and n_open < self._limit:
                if (following := next(queue, None)) is None:
                    left = False
                else:
                    self._engine.add(following[1])
                    n_open += 1
            for event in self._engine.step():
                n_open -= isinstance(event, Failed) or (isinstance(event, Delta) and event.finish is not None)
                yield event

    def _generate(
        self, number: int, one: Asked, method: str, ratio: float, sampling: SamplingParams, salt: bytes
    ) -> Generate:
        budget = replace(BudgetConfig(), method=method, ratio=ratio)
        try:
            resolved = resolve(None, [ImageWish()], budget, self.methods)
        except ApiError as error:
            raise ConfigError(error.message) from None
        aware = resolved.reads_question
        return Generate(
            id=str(number),
            prompt_ids=one.prompt_ids,
            images=[one.image if aware else msgspec.structs.replace(one.image, caption_ids=[])],
            visual=resolved.visual,
            sampling=sampling,
            prefix_salt=salt,
            question_ids=one.question_ids if aware else [],
        )

    def _asked(self, pair: Pair, image: Image) -> Asked:
        turns = [Turn("user", [PicturePlace(), MessageText(pair.question)])]
        try:
            ids = self.prompter.chat(turns, self._info)
        except ApiError as error:
            raise ConfigError(f"{pair.where}: {error.message}") from None
        (caption,) = caption_ids(self.prompter.text_ids, turns)
        image = msgspec.structs.replace(image, caption_ids=caption)
        return Asked(ids, image, question_ids(self.prompter.text_ids, turns), pair.answer, pair.where)
