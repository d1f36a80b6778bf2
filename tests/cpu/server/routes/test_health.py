"""What probes are told in each state of the engine process."""

import time
from typing import Any

import msgspec
import pytest

from foveate.configs.config import ServerConfig
from foveate.configs.errors import ConfigError


def test_a_server_that_has_given_up_is_neither_live_nor_ready(api: Any) -> None:
    api.client.state, api.client.reason = "dead", "the engine process is down: it died 3 times"
    for path in ("/health/live", "/health/ready"):
        reply = api.send("GET", path)
        assert reply.status_code == 503 and "died 3 times" in reply.json()["reason"]


def test_a_starting_server_is_live_and_not_ready(api: Any) -> None:
    api.client.state, api.client.reason = "starting", "the model is being loaded"
    assert api.send("GET", "/health/live").status_code == 200
    assert api.send("GET", "/health/ready").json()["reason"] == "the model is being loaded"


@pytest.mark.parametrize(
    ("silent_s", "turn_s", "word"),
    [(0, 0, ""), (0, 20, ""), (0, 45, "one step for 45 s"), (6, 20, "no heartbeat"), (6, 0, "no heartbeat")],
)
def test_readiness_tells_a_long_step_from_a_hang(api: Any, silent_s: float, turn_s: float, word: str) -> None:
    """In a step no probe is sent, because the probe would wait for the end of the step."""
    api.client.heartbeat = msgspec.structs.replace(api.client.heartbeat, since_step_s=turn_s)
    api.client.heartbeat_at, api.client.turn_s = time.monotonic() - silent_s, turn_s
    reply = api.send("GET", "/health/ready")
    assert reply.status_code == (503 if word else 200), reply.text
    assert word in reply.json().get("reason", "")
    assert not api.client.requests


@pytest.mark.parametrize(
    ("key", "value"),
    [("engine_hang_s", 1.0), ("engine_hang_s", float("nan")), ("engine_step_s", 0.0), ("engine_deaths", 0)],
)
def test_limits_that_would_kill_a_sound_engine_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^server\.{key}: {value}"):
        ServerConfig(**{key: value})
