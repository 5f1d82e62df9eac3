"""Options of clusters that are refused before anything starts."""

import importlib.util

import pytest

from kvfold.cli.app import main
from kvfold.cluster.options import ClusterOptions
from kvfold.errors import ConfigError


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve", "--prefill-workers", "1"]) == 2
    assert "pip install 'kvfold[cluster]'" in capsys.readouterr().err


def test_without_grpc_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "grpc" else object())
    assert main(["serve", "--prefill-workers", "1", "--ray-address", "ray://127.0.0.1:10001"]) == 2
    assert "ray:// needs grpcio, which is not installed; run `pip install" in capsys.readouterr().err


def test_status_without_a_server_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "status", "--url", "http://127.0.0.1:1"]) == 2
    assert "no server answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefill": -1}, "--prefill-workers -1"),
        ({"decode": 0}, "--decode-workers 0"),
        ({"transport": "pigeon"}, "tcp, ray, gloo"),
        ({"link_gbps": float("nan")}, "rate above 0"),
        ({"link_gbps": 1.0, "transport": "gloo"}, "limits TCP alone"),
        ({"stall_seconds": 0.0}, "time above 0"),
        ({"threads": 0}, "positive integer"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ClusterOptions(**options)  # type: ignore[arg-type]
