"""Bodies are parsed as the standard library parses them, but for what is ambiguous, not standard or too costly."""

import json
import random
from typing import Any

import orjson
import pytest

from foveate.configs.config import LimitsConfig
from foveate.server.common.errors import ApiError
from foveate.server.transport.strict_json import MAX_NAMES, parse

LIMITS = LimitsConfig(text_mb=1, image_mb=1, body_values=5000)
LONG = 100_000  # characters, so that a data URL of as many is taken out of the body


def refused(body: bytes, limits: LimitsConfig = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, limits)
    return caught.value


def test_random_bodies_with_long_data_urls_are_what_the_standard_library_reads() -> None:
    draw = random.Random(3)
    letters = 'abc:,[]{}"\\/\n\té€😀\u2028'

    def text() -> str:
        if draw.random() < 0.1:
            return "data:" + "".join(draw.choices('ab/+=\\"\n', k=LONG if draw.random() < 0.3 else 9))
        return "".join(draw.choices(letters, k=draw.randrange(9)))

    def value(depth: int) -> Any:
        kind = draw.randrange(6 if depth else 4)
        if kind == 4:
            return [value(depth - 1) for _ in range(draw.randrange(5))]
        if kind == 5:
            return {text()[:20]: value(depth - 1) for _ in range(draw.randrange(5))}
        return [text(), draw.randrange(-9, 10**6), draw.random(), draw.choice([None, True, False])][kind]

    for _ in range(400):
        body = json.dumps(value(4), ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 2])).encode()
        if draw.random() < 0.3:
            body = body.replace(b"/", b"\\/")
        assert parse(body, LIMITS) == json.loads(body)
        assert parse(bytearray(body), LIMITS) == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [b'{"a": 1, "a": 2}', b'[[{"b": {"a": 1, "\\u0061": 1}}]]', b'{"a": ":\\":", "b": {"c": 1, "c": 1}}',
     b'{"\\\\": 1, "\\\\": 2}', b'{"a": {}, "a": {}}', b'{"": 1, "": 2}'],
)  # fmt: skip
def test_a_key_that_stands_twice(body: bytes) -> None:
    assert "twice" in refused(body).message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nul", b"[1,]", b'{"a" 1}', b"{'a': 1}", b"NaN", b"[Infinity]", b'"\\ud800"', b'"\\x"', b'"a\nb"',
     b"\xff", b'"\xc3"', b"[1] 2", b"[" * 2000 + b"]" * 2000, b'"', b'"data:', b'"a"data:' + b"x" * LONG + b'"',
     b'["data:' + b"x" * LONG, b'["data:' + b"x" * LONG + b'\\"', b'["data:' + b"x" * LONG + b'\\q"]',
     b'["data:' + b"x" * LONG + b'\n"]', b'["data:' + "é".encode() * LONG + b'"]',
     b'{"data:' + b"x" * LONG + b'": 1}',
     b'["data:' + b"x" * LONG + b'\\u00e9"]', b'["data:' + b"x" * LONG + b'\\u00"]'],
)  # fmt: skip
def test_what_is_no_standard_json(body: bytes) -> None:
    error = refused(body)
    assert error.code == "invalid_json" and error.status == 400


def test_escapes_of_client_libraries_in_pictures() -> None:
    url = "data:image/png;base64," + "aB/+" * LONG
    plain = json.dumps([url, {"url": url}]).encode()
    for body in (plain, plain.replace(b"/", b"\\/"), plain.replace(b"+", b"\\u002B"), plain.replace(b"B", b"\\u0042")):
        assert parse(body, LIMITS) == [url, {"url": url}]


def test_a_body_cannot_name_a_mark() -> None:
    """A name, or a text that is what a mark looks like, stays as it is."""
    url = "data:" + "x" * LONG
    found = parse(json.dumps({"0" * 33: url, "a": "0" * 33, "b": url}).encode(), LIMITS)
    assert found == {"0" * 33: url, "a": "0" * 33, "b": url}


def test_limits_hold_to_the_last_value() -> None:
    for make in (
        lambda n: b"[" + b"1," * (n - 2) + b"1]",  # a bracket and n - 2 commas
        lambda n: b"[" + b'"a:,{[",' * (n - 2) + b"1]",
        lambda n: b"[" + b"[" * 900 + b"]" * 900 + b",1" * (n - 902) + b"]",
    ):
        parse(make(5001), LIMITS)
        error = refused(make(5002))
        assert (error.status, error.code) == (413, "too_large") and "limits.body_values 5000" in error.message
    size = 1024 * 1024
    parse(b'"' + b"a" * (size - 2) + b'"', LIMITS)
    assert "limits.text_mb 1" in refused(b'"' + b"a" * (size - 1) + b'"').message
    assert "limits.text_mb 1" in refused(b"[1]" + b" " * size).message
    picture = b'["data:' + b"a" * size + b'"]'
    parse(picture, LIMITS)  # pictures do not count as text
    assert "limits.image_mb 1" in refused(picture.replace(b"a" * 9, b"a" * 20)).message
    names = LimitsConfig(body_values=10**6)
    parse(orjson.dumps({str(i): i for i in range(MAX_NAMES)}), names)
    assert str(MAX_NAMES + 1) in refused(orjson.dumps({str(i): i for i in range(MAX_NAMES + 1)}), names).message
