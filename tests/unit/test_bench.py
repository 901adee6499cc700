"""How the benchmarks evaluate their measurements."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import run


def test_shape_of_bench_json() -> None:
    pairs = [(12.0, 10.0), (11.0, 10.0), (30.0, 10.0), (11.0, 10.0), (11.5, 10.0)]
    result = run.Result("name", "ns", pairs, run.Limit("ratio", 1.25))
    assert json.loads(json.dumps(result.as_json())) == {
        "ratio": {"median": 1.15, "min": 1.1, "max": 3.0, "quartiles": [1.1, 2.1]},
        "ours": 11.5,
        "theirs": 10.0,
        "over": 1.5,
        "unit": "ns",
        "n": 5,
        "limit": 1.25,
        "limit_on": "ratio",
        "limit_is": "most",
        "met": True,
    }
    assert "limit" not in run.Result("name", "ns", pairs).as_json()
    assert len(result.as_row()) == len(run.HEADINGS)


@pytest.mark.parametrize(
    ("on", "bound", "met"),
    [
        ("ratio", 2.0, True),
        ("ratio", 1.99, False),
        ("over", 5.0, True),
        ("over", 4.9, False),
        ("ours", 10.0, True),
        ("ours", 9.9, False),
    ],
)
def test_what_a_limit_is_held_against(on: str, bound: float, met: bool) -> None:
    result = run.Result("name", "ms", [(10.0, 5.0)] * 3, run.Limit(on, bound))
    assert result.met is met
    assert ("MISSED" in result.as_row()[-1]) is not met


@pytest.mark.parametrize(("bound", "met"), [(2.0, True), (2.01, False)])
def test_a_rate_that_must_be_reached(bound: float, met: bool) -> None:
    limit = run.Limit("ratio", bound, at_least=True)
    result = run.Result("name", "MiB/s", [(10.0, 5.0)] * 3, limit)
    assert result.met is met
    assert result.as_json()["limit_is"] == "least"
    assert result.as_row()[-1].startswith(f"ratio ≥ {bound:g}×")
    assert ("MISSED" in result.as_row()[-1]) is not met


@pytest.mark.parametrize(
    ("ours", "theirs", "on", "met"),
    [
        (8050.0, 7000.0, "ratio", True),
        (8100.0, 7000.0, "ratio", False),
        (2000.0, 1000.0, "over", True),  # cheap exits: the ratio would say nothing
        (2100.0, 1000.0, "over", False),
    ],
)
def test_exits_are_judged_by_what_they_cost(ours: float, theirs: float, on: str, met: bool) -> None:
    result = run.judge_exits(run.Result("exit_loop", "ns", [(ours, theirs)] * 3))
    assert (result.limit and result.limit.on, result.met) == (on, met)


def test_pairs_alternate_who_begins() -> None:
    calls: list[str] = []

    def side(name: str, value: float) -> Any:
        def measure() -> float:
            calls.append(name)
            return value

        return measure

    assert run.alternate(side("ours", 2.0), side("theirs", 1.0), 3) == [(2.0, 1.0)] * 3
    assert calls == ["ours", "theirs"] * 2 + ["theirs", "ours"] + ["ours", "theirs"]


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/dev/kvm")

    monkeypatch.setattr(run, "Kvm", refuse)
    assert run.main([]) == 2
    assert "/dev/kvm" in capsys.readouterr().err
