"""`foveate tune` on a few bundled scenes, and a server with the preset it wrote."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import httpx

from foveate.bundled.scenes import HELD_OUT_SEED
from foveate.server.launch import launched
from foveate.tune.confidence import allowed_misses
from foveate.tune.data import Pair, scenes

ARGUMENTS = ["tiny-llava", "--scenes", "10", "--methods", "hiprune", "--agreement", "0.8", "--max-tokens", "24"]


def tune(out: Path) -> str:
    script = Path(sys.executable).with_name("foveate")
    command = [str(script), "tune", *ARGUMENTS, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(client: httpx.Client, pair: Pair, visual: dict[str, object]) -> tuple[str, dict[str, float]]:
    assert isinstance(pair.picture, bytes), "scenes are rendered"
    url = "data:image/png;base64," + base64.b64encode(pair.picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": pair.question}]
    body = {
        "model": "tiny-llava", "temperature": 0, "max_tokens": 24, "vlm": {"visual": visual},
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    data = reply.json()
    return data["choices"][0]["message"]["content"], data["usage"]["vlm"]["visual"]


def test_a_tuned_preset_is_served_and_holds(tmp_path: Path) -> None:
    said = tune(tmp_path)
    state = (tmp_path / "state.jsonl").read_bytes()
    report = json.loads((tmp_path / "report.json").read_text())
    same, asked = report["confirmed"]["same"], report["confirmed"]["asked"]
    assert asked - same <= allowed_misses(asked, 0.8) and report["lower_bound"] >= 0.8
    assert f"{same} of {asked} held-out pairs" in said or "no saving could be confirmed" in said
    cost = sum(report["confirmed"]["layers"]) / 4
    assert tune(tmp_path) == said and (tmp_path / "state.jsonl").read_bytes() == state, "a second run measures nothing"

    fresh = scenes(4, HELD_OUT_SEED + 9_000_000)
    same, shares = 0, set()
    with (
        launched("tiny-llava", "--config", str(tmp_path / "preset.yaml")) as server,
        httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as client,
    ):
        for pair in fresh:
            pruned, visual = ask(client, pair, {})
            full, _ = ask(client, pair, {"method": "none", "ratio": 1.0})
            same += pruned == full
            shares.add(round(visual.get("kept_mean", visual["kept"]) / visual["offered"], 4))
    (share,) = shares
    assert abs(share - cost) < 0.002, "the server spends what the report says"
    assert same >= 0.7 * len(fresh)
