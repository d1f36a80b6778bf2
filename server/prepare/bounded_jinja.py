"""A jinja environment that ends: a sandbox in which rendering has a time limit, and no value outgrows a limit.

A thread cannot be stopped from outside, so the compiled template checks the clock itself: at each pass of a loop and at
each call of a macro or function. Single operations are bounded by the size of what they make: repetition, powers,
concatenation, and the methods and filters that pad, repeat or multiply texts.
"""

import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jinja2
import jinja2.compiler
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_VALUE = 4_000_000  # characters or items of one value
MAX_NUMBER_BITS = 4096
_MAX_PRODUCT = 16 * MAX_VALUE
_MULTIPLYING = ("replace", "join", "translate", "expandtabs", "indent")
_WIDE = re.compile(r"\d{7}|\*")  # a width in a format
_SIZED = (str, bytes, list, tuple, dict)
T = TypeVar("T")
_CHECK = "foveate_check_time"
_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline of the rendering")


class OutOfBounds(Exception):
    """Rendering takes too long or makes too much."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let all rendering inside the block raise OutOfBounds after `seconds`."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def check_time() -> str:
    """Return an empty text, because a template prints it. Raises OutOfBounds after the deadline."""
    if time.monotonic() > _deadline.get(float("inf")):
        raise OutOfBounds("it renders these messages without end")
    return ""


def bounded(value: T) -> T:
    """Return `value`. Raises OutOfBounds if the value is too large."""
    if isinstance(value, _SIZED) and len(value) > MAX_VALUE:
        raise OutOfBounds("it makes a value that is too large")
    if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        raise OutOfBounds("it makes a number that is too large")
    return value


def _check_operands(operator: str, left: object, right: object) -> None:
    """Raise OutOfBounds before an operation that would make too large a value."""
    if operator == "%" and isinstance(left, str) and _WIDE.search(left):
        raise OutOfBounds("it pads a text without end")
    for one, other in ((left, right), (right, left)):
        if operator == "*" and isinstance(one, _SIZED) and isinstance(other, int) and len(one) * other > MAX_VALUE:
            raise OutOfBounds("it repeats a value without end")
    if operator == "**" and isinstance(right, int) and abs(right) > MAX_NUMBER_BITS:
        raise OutOfBounds("it makes a number that is too large")
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * (right if operator == "**" else 1) > MAX_NUMBER_BITS:
            raise OutOfBounds("it makes a number that is too large")


def _check_arguments(name: str, given: Sequence[object]) -> None:
    """Raise OutOfBounds before a call that could make far more than is given: padding, and text for text."""
    if any(isinstance(each, int) and abs(each) > MAX_VALUE for each in given):
        raise OutOfBounds("it calls a function with too large a number")
    if name.startswith("format") and any(isinstance(each, str) and _WIDE.search(each) for each in given):
        raise OutOfBounds("it pads a text without end")
    sizes = sorted(len(each) for each in given if isinstance(each, _SIZED))
    if name in _MULTIPLYING and len(sizes) > 1 and sizes[-1] * sizes[-2] > _MAX_PRODUCT:
        raise OutOfBounds("it replaces text without end")


class _Compiler(jinja2.compiler.CodeGenerator):
    """Compiles a check of the clock into each pass of a loop and each macro, and a check of size around values."""

    def visit_For(self, node: jinja2.nodes.For, frame: jinja2.compiler.Frame) -> None:
        node.body.insert(0, _checking(node))
        super().visit_For(node, frame)

    def visit_Macro(self, node: jinja2.nodes.Macro, frame: jinja2.compiler.Frame) -> None:
        node.body.insert(0, _checking(node))
        super().visit_Macro(node, frame)

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Concat(node, frame)
        self.write(")")


def _checking(node: jinja2.nodes.Node) -> jinja2.nodes.Node:
    call = jinja2.nodes.Call(jinja2.nodes.Name(_CHECK, "load"), [], [], None, None)
    assert node.environment is not None, "parsed by an environment"
    return jinja2.nodes.Output([call]).set_lineno(node.lineno).set_environment(node.environment)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. Render within `time_limit`."""

    code_generator_class = _Compiler
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)  # nothing is computed at compile time, where no limit holds
        self.bounded = bounded
        self.globals[_CHECK] = check_time
        self.filters = {name: _bounded_filter(name, made) for name, made in self.filters.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method for a template."""
        check_time()
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        _check_arguments(getattr(function, "__name__", ""), (owner, *args, *kwargs.values()))
        return bounded(super().call(context, function, *args, **kwargs))


def _bounded_filter(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter with bounded arguments and result."""

    @functools.wraps(made)  # keeps the marks by which jinja passes a context
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_time()
        _check_arguments(name, (*args, *kwargs.values()))
        return bounded(made(*args, **kwargs))

    return checked
