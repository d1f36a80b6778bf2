"""What a request gets where the request leaves a sampling field out: the checkpoint's generation_config.json.

The rules are those of vLLM, and `do_sample: false` is greedy as in `transformers`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from foveate.configs.config import ModelConfig
from foveate.configs.errors import ConfigError
from foveate.engine.common import Section

FILE = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values of omitted fields. Those here hold where the checkpoint says nothing."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None  # None: as many as the context leaves

    @classmethod
    def load(cls, model_dir: Path, config: ModelConfig) -> "SamplingDefaults":
        """Read the checkpoint's file, unless there is none or the setting `model.generation_config` says ignore.

        Raises:
            ConfigError: a value of the file is wrong; the file, the key and the way out are named.
        """
        path = model_dir / FILE
        if config.generation_config == "ignore" or not path.is_file():
            return cls()
        file = Section.read(path, ConfigError)
        try:
            return cls._read(file)
        except ConfigError as error:
            remedy = "correct the file, or leave it unread with model.generation_config=ignore"
            raise ConfigError(f"{error}; {remedy}") from None

    @classmethod
    def _read(cls, file: Section) -> "SamplingDefaults":
        greedy = not file.flag("do_sample", True)
        temperature = _number(file, "temperature", cls().temperature, lambda x: x >= 0, "a number from 0 up")
        penalty = _number(file, "repetition_penalty", cls().repetition_penalty, lambda x: x > 0, "a number above 0")
        return cls(
            temperature=0.0 if greedy else temperature,
            top_p=_number(file, "top_p", cls().top_p, lambda x: 0 < x <= 1, "above 0, up to 1"),
            top_k=_count(file, "top_k", cls().top_k, -1),
            min_p=_number(file, "min_p", cls().min_p, lambda x: 0 <= x <= 1, "from 0 to 1"),
            repetition_penalty=penalty,
            max_tokens=_count(file, "max_new_tokens", 1, 1) if "max_new_tokens" in file else None,
        )

    def __str__(self) -> str:
        """All values in one line, for the log."""
        return ", ".join(f"{name} {'unlimited' if value is None else value}" for name, value in asdict(self).items())


def _number(file: Section, key: str, default: float, is_legal: Callable[[float], bool], legal: str) -> float:
    value = file.number(key, default)
    if not is_legal(value):
        raise ConfigError(f"{file.where}: {key} is {value:g}, not {legal}")
    return value


def _count(file: Section, key: str, default: int, least: int) -> int:
    value = file.number(key, default)  # some files write 50.0
    if value != int(value) or value < least:
        raise ConfigError(f"{file.where}: {key} is {value:g}, not a whole number from {least} up")
    return max(int(value), 0)
