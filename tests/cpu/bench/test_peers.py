"""Tables of the comparison with other servers: ratios, bounds, names of systems."""

from dataclasses import replace

import pytest


def test_ratios_are_of_medians_and_only_of_what_was_measured(bench, row):
    rows = {
        "ours 16 bit": row("ours 16 bit", "bf16", tpot_s=[0.03, 9.0, 0.04], tokens_per_s=[40.0]),
        "vllm": row("vllm", tpot_s=[0.1, 0.08, 0.09], tokens_per_s=[20.0]),
    }
    found = {ratio.name: ratio for ratio in bench.peers.table.ratios(rows)}
    assert found.keys() == {"TPOT, ours / vLLM", "tok/s of 8, ours / vLLM"}
    tpot, rate = found["TPOT, ours / vLLM"], found["tok/s of 8, ours / vLLM"]
    assert tpot.value == pytest.approx(0.04 / 0.09) and tpot.met
    assert rate.value == pytest.approx(2.0) and rate.met
    assert not replace(rate, value=1.89).met and not replace(tpot, value=0.51).met
    assert "| 0.44 | <= 0.50 | yes |" in bench.peers.table.ratio_table([tpot])


def test_variants_are_chosen_by_how_they_begin(bench):
    assert [v.name for v in bench.peers.__main__.chosen("ours int,vllm")] == ["ours int8", "ours int4", "vllm"]
    assert len(bench.peers.__main__.chosen("")) == len(bench.peers.__main__.VARIANTS)
    with pytest.raises(SystemExit, match="there are ours 16 bit"):
        bench.peers.__main__.chosen("mine")
