"""What the person who runs the server reads: progress of loading, banner, throughput under load, quiet libraries."""

import asyncio
import io
import logging
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from foveate.configs.config import BudgetConfig, Config, ModelConfig, ServerConfig
from foveate.server.report import LoadProgress, banner, report_load, set_up_log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STEPS = [f"progress: {done} 4000000000" for done in range(0, 4_000_000_001, 40_000_000)]


def test_a_terminal_shows_a_bar() -> None:
    out = Terminal()
    progress = LoadProgress(out)
    for step in STEPS:
        progress.show(step)
    drawn = out.getvalue().split("\r")
    assert len(drawn) == 102 and "[###############...............]  50% of 4,000 MB" in drawn[51]
    assert drawn[-1] == "loading weights [##############################] 100% of 4,000 MB\n"


def test_a_file_gets_four_lines(caplog: pytest.LogCaptureFixture) -> None:
    progress = LoadProgress(io.StringIO())
    with caplog.at_level(logging.INFO):
        for step in STEPS:
            progress.show(step)
    assert [record.getMessage() for record in caplog.records] == [
        f"loading weights: {share} % of 4,000 MB" for share in (25, 50, 75, 100)
    ]


@pytest.mark.parametrize("line", ["progress: ", "progress: 1", "progress: a b", "progress: 1 0", "progress: -1 5"])
def test_a_broken_line_shows_nothing(line: str) -> None:
    out = Terminal()
    LoadProgress(out).show(line)
    assert out.getvalue() == ""


def test_the_banner_names_what_is_served_and_no_secret(api: Any) -> None:
    config = Config(
        model=ModelConfig(name="m", aliases=("org/m",)),
        server=ServerConfig(api_keys=("xyzzy",)),
        budget=BudgetConfig(ratio=0.5, tokens=64),
    )
    lines = "\n".join(banner(config, msgspec.structs.replace(api.client.model, cache_mb=128)))
    for fact in ("m, org/m", "fp32", "float32", "cpu with avx2", "2000 tokens", "128 MB: 1600 tokens", "1 API keys",
                 "64 visual tokens and 0.5 of the offered", "method foveal"):  # fmt: skip
        assert fact in lines, fact
    assert "xyzzy" not in lines
    plain = "\n".join(banner(replace(config, budget=BudgetConfig(), server=ServerConfig()), api.client.model))
    assert "every visual token" in plain and "no API key" in plain


def test_throughput_is_a_line_under_load_and_silence_when_idle(api: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = api.client

    async def work() -> None:
        task = asyncio.create_task(report_load(client, every_s=0.2))
        await asyncio.sleep(0.3)
        client.heartbeat = msgspec.structs.replace(
            client.heartbeat,
            prompt_tokens=100,
            cached_tokens=40,
            output_tokens=30,
            running=3,
            waiting=2,
            used_blocks=25,
        )
        await asyncio.sleep(0.2)  # a line
        client.heartbeat = msgspec.structs.replace(client.heartbeat, running=0, waiting=0)
        await asyncio.sleep(0.6)  # no line
        task.cancel()

    with caplog.at_level(logging.INFO):
        asyncio.run(work())
    (line,) = [record.getMessage() for record in caplog.records if record.name == "foveate.server"]
    assert line == (
        "load: prompt 500.0 tokens/s, output 150.0 tokens/s, running 3, waiting 2, KV cache 25.0 % used, "
        "prefix hits 40.0 %"
    )


def test_libraries_that_log_urls_are_quiet() -> None:
    try:
        set_up_log(Config(server=ServerConfig(log_level="debug", log_requests=False)))
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
        assert logging.getLogger("foveate.request").disabled
    finally:
        set_up_log(Config())
    assert not logging.getLogger("foveate.request").disabled
