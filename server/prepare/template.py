"""Render the model's chat template as `transformers` does: same environment, same variables.

The server uses only the template in the model's directory, never a template from a request. The template runs in
jinja's immutable sandbox, with limits of time and size. A trial at load finds the accepted content formats.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from pydantic import JsonValue

from foveate.configs.errors import ConfigError
from foveate.server.prepare.bounded_jinja import BoundedEnvironment, OutOfBounds, check_time, limits

FIXED_CHARS = 1_000_000
MAX_GROWTH = 16  # characters rendered per character given, beyond the fixed part
VALUE_GROWTH = 4  # characters of one value per character given, beyond the fixed part
RENDER_S = 1.0  # longest time for one prompt
_PROBE = "foveate probe"
# What jinja and the functions of Python raise for a template that does not fit the messages.
_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError
)  # fmt: skip
TemplateMessage = Mapping[str, JsonValue]


class TemplateFailed(Exception):
    """The template refuses the messages. The text comes from the template (`raise_exception`) or is generic."""


class TemplateEndless(TemplateFailed):
    """Rendering takes too long or makes too much. The text says what."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the text that a model is trained on. At inference, the tag has no effect."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: JsonValue,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace jinja's own filter, which escapes HTML: chat templates expect plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateFailed(str(message)[:500])


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def read_json(path: Path) -> dict[str, JsonValue]:
    """Read a JSON object. Empty if the file does not exist. Raises ConfigError if the file is not JSON."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def find_source(model_dir: Path) -> str | None:
    """Return the text of the default template, from the file that `transformers` would take.

    A processor's files come before a tokenizer's, and the older chat_template.json before chat_template.jinja.
    """
    for name in ("processor_config.json", "chat_template.json"):
        if (found := _default(read_json(model_dir / name))) is not None:
            return found
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        if (model_dir / name).is_file():
            return (model_dir / name).read_text("utf-8")
    return _default(read_json(model_dir / "tokenizer_config.json"))


def _default(settings: Mapping[str, JsonValue]) -> str | None:
    """The template under `chat_template`: a text, or several by name, as an object or as a list of objects."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {str(entry["name"]): entry["template"] for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _texts(parsed: jinja2.nodes.Template) -> tuple[frozenset[str], frozenset[str]]:
    """Return all texts of a template, and those that the template compares or hands to functions."""
    asking = parsed.find_all((jinja2.nodes.Compare, jinja2.nodes.Call, jinja2.nodes.Filter, jinja2.nodes.Test))
    asked = {constant.value for node in asking for constant in node.find_all(jinja2.nodes.Const)}
    written = {data.data for data in parsed.find_all(jinja2.nodes.TemplateData)}
    written |= {constant.value for constant in parsed.find_all(jinja2.nodes.Const)}
    return frozenset(each for each in written if isinstance(each, str)), frozenset(
        each for each in asked if isinstance(each, str)
    )


class Template:
    """A compiled chat template.

    Attributes:
        takes_text: whether content may be plain text.
        takes_parts: whether content may be a list of parts. Images need parts.
        writes: the texts of the template, without its code.
        looks_for: those that the template compares with or hands to functions, such as "</think>" in an answer.
        endless: why rendering does not end on a short message. None if rendering ends.

    Raises:
        ConfigError: the source does not compile.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.add_filter("tojson", _tojson)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.writes, self.looks_for = _texts(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"model.path: the chat template is broken: line {error.lineno}: {error}") from None
        except (SyntaxError, RecursionError, MemoryError, OverflowError):  # Python's, for blocks in blocks in blocks
            raise ConfigError("model.path: the chat template is broken: its blocks are nested too deep") from None
        self._special = dict(special)
        self.endless: str | None = None
        self.takes_text = self._renders(_PROBE)
        self.takes_parts = self._renders([{"type": "text", "text": _PROBE}])

    def render(self, messages: Sequence[TemplateMessage], add_generation_prompt: bool) -> str:
        """Render the prompt as text. Raises TemplateFailed."""
        n_given = sum(len(str(message.get("content"))) for message in messages)
        most = FIXED_CHARS + MAX_GROWTH * n_given
        variables: dict[str, object] = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special,
        }
        pieces: list[str] = []
        n_chars = 0
        try:
            with limits(RENDER_S, FIXED_CHARS + VALUE_GROWTH * n_given):
                for piece in self._template.generate(variables):
                    check_time()
                    pieces.append(piece)
                    n_chars += len(piece)
                    if n_chars > most:
                        raise OutOfBounds("it renders these messages without end")
        except OutOfBounds as error:
            raise TemplateEndless(str(error)) from None
        except _ERRORS:
            raise TemplateFailed("it cannot render these messages") from None
        return "".join(pieces)

    def _renders(self, content: JsonValue) -> bool:
        try:
            text = self.render([{"role": "user", "content": content}], add_generation_prompt=True)
        except TemplateEndless as error:
            self.endless = str(error)
            return False
        except TemplateFailed:
            return False
        return text.count(_PROBE) == 1 and f"'{_PROBE}'" not in text  # refuse a template that prints the list itself
