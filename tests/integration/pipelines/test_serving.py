"""The session service as the demo starts it."""

from pathlib import Path

import pytest

from minwm.errors import SessionError
from minwm_pipelines.serving import served

pytestmark = pytest.mark.integration


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    expected = r"ended while starting: .*not a world model \(it has no world\.json\)"
    with pytest.raises(SessionError, match=expected), served(tmp_path, tmp_path / "service.log"):
        pass
