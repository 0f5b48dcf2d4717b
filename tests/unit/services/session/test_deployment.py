"""What the service refuses before it starts anything."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minwm.errors import ConfigError
from minwm_session.deployment import ServiceConfig

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Path("/nowhere")}, "model: /nowhere is no folder"),
        ({"slots": 0}, "slots: 0, expected a positive number"),
        ({"idle_seconds": -1.0}, "idle_seconds: -1.0, expected a positive number"),
        ({"port": 70000}, "port: 70000, expected 1 to 65535"),
        ({"metrics_port": 0}, "metrics_port: 0, expected 1 to 65535"),
        ({"metrics_port": 9000}, "metrics_port: 9000 is the gRPC port too"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServiceConfig(**{"model": tmp_path, **change})


def test_a_gpu_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: cuda, expected cpu: PyTorch sees no GPU here"):
        ServiceConfig(model=tmp_path, device="cuda")
