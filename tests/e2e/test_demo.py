"""The first thing a user runs."""

import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo.py"


def demo(*arguments: str) -> tuple[int, str, str]:
    """Run it; its status, what it printed, and what it complained of."""
    process = subprocess.Popen(
        [sys.executable, str(DEMO), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        printed, complained = process.communicate(timeout=180.0)
    except subprocess.TimeoutExpired:
        process.terminate()  # it stops its server, which a kill would orphan
        printed, complained = process.communicate(timeout=60.0)
        raise AssertionError(f"the demo did not end:\n{printed}{complained}") from None
    return process.returncode, printed, complained


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    status, printed, complained = demo("--picture", str(picture))
    assert status == 0, printed + complained
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"(\d+) of (\d+) +\d+ ms +\d+ ms", printed)
    full, quarter = rows[0::2], rows[1::2]
    assert len(full) == len(quarter) >= 4
    assert all(kept == offered for kept, offered in full)
    assert all(int(kept) == (int(offered) + 2) // 4 for kept, offered in quarter)
    assert re.search(r"^full .*median time to first token \d+ ms$", printed, re.MULTILINE)
    assert re.search(r"^quarter .*median time to first token \d+ ms$", printed, re.MULTILINE)


def test_a_model_that_is_not_there_fails_the_demo(tmp_path: Path) -> None:
    status, _, complained = demo(str(tmp_path / "no-model"), "--picture", str(tmp_path / "scene.png"))
    assert status != 0
    assert "the server ended" in complained and "no-model" in complained
