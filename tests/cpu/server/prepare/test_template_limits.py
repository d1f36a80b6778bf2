"""A chat template of a checkpoint ends in time and in memory, whatever it does."""

import time
import tracemalloc

import pytest

from foveate.configs.errors import ConfigError
from foveate.server.prepare import template as module
from foveate.server.prepare.template import Template, TemplateFailed

SAID = [{"role": "user", "content": "hello"}]
LOOPS = {
    "nested loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "loops of nothing": "{% for a in range(90000) %}{% for b in range(90000) %}{{ '' }}{% endfor %}{% endfor %}",
    "loop in a macro": "{% macro m() %}{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    "{% endmacro %}{{ m() }}",
    "two macros call each other": "{% macro a(n) %}{{ b(n) }}{{ b(n) }}{% endmacro %}{% macro b(n) %}{% if n < 40 %}"
    "{{ a(n + 1) }}{% endif %}{% endmacro %}{{ a(0) }}",
    "recursive macro": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "call block": "{% macro m() %}{{ caller() }}{% endmacro %}{% for i in range(90000) %}{% for j in range(90000) %}"
    "{% call m() %}x{% endcall %}{% endfor %}{% endfor %}",
    "output without end": "{% for a in range(90000) %}{% for b in range(900) %}{{ 'xxxx' }}{% endfor %}{% endfor %}",
}
GROWTH = {
    "repetition": "{{ 'a' * 10**10 }}",
    "repetition from the right": "{{ 10000000000 * 'a' }}",
    "list repetition": "{{ ([1] * 10**10) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "product": "{% set ns = namespace(x=3) %}{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "concatenation": "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "sum": "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "list sum": "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "center filter": "{{ 'x' | center(10**9) }}",
    "center method": "{{ 'x'.center(10**9) }}",
    "ljust method": "{{ 'x'.ljust(10**9) }}",
    "zfill method": "{{ 'x'.zfill(10**9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
    "join": "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
    "join filter": "{% set a = 'a' * 1000000 %}{{ a | list | join(a) }}",
    "indent filter": "{% set a = '\\n' * 1000000 %}{{ a | indent(1000000, blank=true) }}",
    "big range": "{{ range(10**12) | list | length }}",
    "batch filter": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "slice filter": "{{ [1] | slice(10**9) | list | length }}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_a_loop_ends_in_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENDER_S", 0.2)
    template = Template(source, {})
    started = time.monotonic()
    with pytest.raises(TemplateFailed):
        template.render(SAID, add_generation_prompt=True)
    assert time.monotonic() - started < 0.6


@pytest.mark.parametrize("source", GROWTH.values(), ids=GROWTH)
def test_growth_ends_in_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENDER_S", 1.0)
    tracemalloc.start()
    try:
        template = Template(source, {})  # nothing is computed while the template is compiled, either
        started = time.monotonic()
        with pytest.raises(TemplateFailed):
            template.render(SAID, add_generation_prompt=True)
        assert time.monotonic() - started < 2.0, "tracing slows the rendering down"
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_a_broken_template_is_still_one_line() -> None:
    with pytest.raises(ConfigError, match="the chat template is broken: line 1"):
        Template("{% for %}", {})


def test_ordinary_templates_render_as_before_and_fast() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}[{{ ns.n }}|"
        "{{ m['role'] | upper }}: {{ m['content'] | trim | replace('l', 'L') }}|"
        "{{ '%s %d' | format('a', 3) }}|{{ 'x' ~ loop.index ~ 'y' }}]\n"
        "{% endfor %}{{ messages | map(attribute='role') | join(', ') }}{{ 'ab' * 3 }}{{ 2 ** 10 }}"
    )
    template = Template(source, {})
    assert template.render(SAID, False) == "[1|USER: heLLo|a 3|x1y]\nuserababab1024"
    started = time.perf_counter()
    for _ in range(200):
        template.render(SAID * 4, False)
    assert (time.perf_counter() - started) / 200 < 0.002
