"""A jinja environment that ends: a sandbox in which rendering has a time limit, and all values have a size limit.

A thread cannot be stopped from outside, and one operation of the interpreter cannot be interrupted at all. So two kinds
of checks hold a rendering:

- The clock is read in each pass of a loop, each macro, and each access, call, filter and test.
- Every value that the template makes is weighed, with all that the value holds. One value may weigh so much that no
  operation on the value takes long, and all values of a rendering together have a limit as well. A list that holds the
  same list twice, again and again, is small in memory and endless in print: `weigh` counts what would be printed.
  Operations that can make far more than they are given (repetition, padding, replacement) are refused beforehand.
"""

import contextvars
import functools
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import jinja2
import jinja2.compiler
import jinja2.nodes
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_NUMBER_BITS = 4096
MAX_DEPTH = 100  # lists within lists
SLOW_CHARS = 100_000  # for filters that take a microsecond per character, or square time
_ITEM = 8  # the weight of an item besides its text
_ALL_VALUES = 64  # all values of a rendering together, in weights of the largest value
_PRODUCT = 16  # what an operation may make by multiplying, in weights of the largest value
_MULTIPLYING = ("replace", "join", "translate", "expandtabs", "indent", "tojson")
_FORMATTING = ("format", "format_map")
_SLOW = ("pprint", "striptags", "title", "urlize", "wordcount", "wordwrap", "xmlattr")
_WIDE = re.compile(r"%[^a-zA-Z%]*?(\d{4}|\*)|\{[^{}]*\d{4}")  # a large or computed width in a format
_HOLDERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)
_PASSED = (jinja2.Environment, jinja2.runtime.Context, jinja2.nodes.EvalContext)  # what jinja itself passes to filters
T = TypeVar("T")


class OutOfBounds(Exception):
    """Rendering takes too long or makes too much."""


class _Rendering:
    """What is left to one rendering."""

    def __init__(self, seconds: float, largest: int) -> None:
        self.deadline = time.monotonic() + seconds
        self.largest = largest
        self.left = _ALL_VALUES * largest
        self._known: dict[int, tuple[object, int, int]] = {}  # holder, weight and depth; the sandbox changes no holder

    def weigh(self, value: object) -> int:
        """Return the number of characters that the value makes in print, roughly. Raises OutOfBounds."""
        return self._measure(value)[0]

    def _measure(self, value: object) -> tuple[int, int]:
        if isinstance(value, (str, bytes)):
            return len(value), 0
        if not isinstance(value, _HOLDERS):
            return _ITEM, 0
        if (known := self._known.get(id(value))) is not None:
            return known[1], known[2]
        weight, depth = _ITEM, 0
        held: Iterable[object] = value if not isinstance(value, dict) else (*value.keys(), *value.values())
        for each in held:
            inner, below = self._measure(each)
            weight, depth = weight + inner + _ITEM, max(depth, below)
            if weight > self.largest:
                raise OutOfBounds("it makes a value that is too large")
        if depth >= MAX_DEPTH:
            raise OutOfBounds("it makes a value that is too deep")
        self._known[id(value)] = value, weight, depth + 1
        return weight, depth + 1


_current: contextvars.ContextVar[_Rendering] = contextvars.ContextVar("rendering")


@contextmanager
def limits(seconds: float, largest: int) -> Iterator[None]:
    """Let rendering inside the block raise OutOfBounds after `seconds`, or for a value of more than `largest`."""
    token = _current.set(_Rendering(seconds, largest))
    try:
        yield
    finally:
        _current.reset(token)


def check_time() -> None:
    """Raise OutOfBounds after the deadline."""
    if time.monotonic() > _current.get().deadline:
        raise OutOfBounds("it renders these messages without end")


def _bounded(value: T) -> T:
    """Return a value that the template made. Raises OutOfBounds if the value is too large."""
    if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        raise OutOfBounds("it makes a number that is too large")
    rendering = _current.get()
    weight = rendering.weigh(value)
    rendering.left -= weight
    if weight > rendering.largest or rendering.left < 0:
        raise OutOfBounds("it makes values that are too large")
    return value


def _check_product(one: int, other: int) -> None:
    if one * other > _PRODUCT * _current.get().largest:
        raise OutOfBounds("it multiplies a text without end")


def _check_format(pattern: str, others: int) -> None:
    if _WIDE.search(pattern):
        raise OutOfBounds("it pads a text without end")
    _check_product(pattern.count("%") + pattern.count("{"), max(1000, others))


def _check_operands(operator: str, left: object, right: object) -> None:
    """Raise OutOfBounds before an operation that would make too large a value."""
    weigh = _current.get().weigh
    if operator == "%" and isinstance(left, str):
        _check_format(left, weigh(right))
    if operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, (str, bytes, list, tuple)) and isinstance(other, int):
                if weigh(one) * other > _current.get().largest:
                    raise OutOfBounds("it repeats a value without end")
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * (abs(right) if operator == "**" else 1) > MAX_NUMBER_BITS:
            raise OutOfBounds("it makes a number that is too large")


def _check_arguments(name: str, given: Sequence[object]) -> None:
    """Raise OutOfBounds before a call that would make far more than is given, or take far longer than its size."""
    rendering = _current.get()
    if any(isinstance(each, int) and abs(each) > rendering.largest for each in given):
        raise OutOfBounds("it calls a function with too large a number")
    sizes = [abs(each) if isinstance(each, int) else rendering.weigh(each) for each in given]
    if name in _MULTIPLYING:
        _check_product(*sorted([1, 1, *sizes])[-2:])
    if name in _FORMATTING and given and isinstance(given[0], str):
        _check_format(given[0], sum(sizes[1:]))
    if name in _SLOW and sum(sizes) > SLOW_CHARS:
        raise OutOfBounds(f"it calls {name} with too large a value")
    if name == "round" and any(isinstance(each, int) and abs(each) > MAX_NUMBER_BITS for each in given[1:]):
        raise OutOfBounds("it rounds to too many digits")
    if name == "sum" and any(isinstance(each, _HOLDERS) for each in given[1:]):
        raise OutOfBounds("it adds lists up")


class _Namespace(jinja2.utils.Namespace):
    """A namespace can change, so its weight is unknown: in print, a namespace does not show what is inside."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Compiler(jinja2.compiler.CodeGenerator):
    """Compiles a check of the clock into each pass of a loop and each macro, and a check of size around values."""

    def visit_For(self, node: jinja2.nodes.For, frame: jinja2.compiler.Frame) -> None:
        node.body.insert(0, _look_at_clock(node))
        super().visit_For(node, frame)

    def visit_Macro(self, node: jinja2.nodes.Macro, frame: jinja2.compiler.Frame) -> None:
        node.body.insert(0, _look_at_clock(node))
        super().visit_Macro(node, frame)

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Concat(node, frame)
        self.write(")")

    def visit_List(self, node: jinja2.nodes.List, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.bounded(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: jinja2.nodes.Tuple, frame: jinja2.compiler.Frame) -> None:
        if node.ctx != "load":  # the targets of a loop or an assignment
            return super().visit_Tuple(node, frame)
        self.write("environment.bounded(")
        super().visit_Tuple(node, frame)
        return self.write(")")


def _look_at_clock(node: jinja2.nodes.Node) -> jinja2.nodes.Node:
    look = jinja2.nodes.ExprStmt(jinja2.nodes.EnvironmentAttribute("time_is_left"))
    assert node.environment is not None, "parsed by an environment"
    return look.set_lineno(node.lineno).set_environment(node.environment)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. Render within `limits`."""

    code_generator_class = _Compiler
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    bounded = staticmethod(_bounded)

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)  # nothing is computed at compile time, where no limit holds
        del self.globals["lipsum"]  # makes any amount of text from a number
        self.globals["namespace"] = _Namespace
        for name, made in self.filters.items():
            self.add_filter(name, made)
        self.tests = {name: _timed(cast(Callable[..., Any], made)) for name, made in self.tests.items()}

    def add_filter(self, name: str, made: Callable[..., Any]) -> None:
        """Add a filter, or replace one, with bounds around."""
        self.filters[name] = _bounded_filter(name, made)

    @property
    def time_is_left(self) -> bool:
        """True. Raises OutOfBounds after the deadline. The compiled template reads this attribute."""
        check_time()
        return True

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join the output of a macro or block."""
        pieces = list(pieces)
        if sum(map(len, pieces)) > _current.get().largest:
            raise OutOfBounds("it makes values that are too large")
        return _bounded("".join(pieces))

    def getitem(self, obj: Any, argument: Any) -> Any:
        check_time()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        check_time()
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method for a template."""
        check_time()
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        _check_arguments(getattr(function, "__name__", ""), (owner, *args, *kwargs.values()))
        return _bounded(super().call(context, function, *args, **kwargs))


def _timed(made: Callable[..., Any]) -> Callable[..., Any]:
    """Return the test with a check of the clock."""

    @functools.wraps(made)  # keeps the marks by which jinja passes a context
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_time()
        return made(*args, **kwargs)

    return checked


def _bounded_filter(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter with bounded arguments and result."""

    @functools.wraps(made)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_time()
        given = [each for each in args if not isinstance(each, _PASSED)]
        _check_arguments(name, (*given, *kwargs.values()))
        return _bounded(made(*args, **kwargs))

    return checked
