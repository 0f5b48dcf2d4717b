"""Trajectories played on a scripted service: keys, report, video."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from minwm.client.overlay import draw_keys
from minwm.client.playback import Playback, play_trajectory, write_report, write_video
from minwm.errors import SessionError
from minwm.geometry.trajectory import KEYS, parse

pytestmark = pytest.mark.unit

Serving = Callable[[], Any]


async def play(serving: Serving, trajectory: str) -> Playback:
    async with serving() as address:
        return await play_trajectory(address, parse(trajectory), seed=5)


def test_every_chunk_has_the_keys_of_its_step_and_every_press_a_latency(serving: Serving, service: Any) -> None:
    service.delays = dict.fromkeys(range(7), 0.02)
    playback = asyncio.run(play(serving, "w*3,w+l*3,d"))
    assert list(playback.keys) == [{"w"}] * 3 + [{"w", "l"}] * 3 + [{"d"}]
    report = playback.report
    assert (report.model, report.chunks, report.frames) == ("flat", 7, 56)
    assert report.action_to_frame_seconds.samples == 7
    assert 0.02 <= report.action_to_frame_seconds.p50 <= report.action_to_frame_seconds.p95 < 1
    assert 20 < report.frames_per_second < 82
    assert report.server_seconds["denoise"] == 0.03
    assert (service.opened.start_name, service.opened.seed) == ("hall", 5)


def test_a_session_that_ends_early_says_how_far_it_came(serving: Serving, service: Any) -> None:
    service.end_after = 2
    with pytest.raises(SessionError, match="after 2 of 4 chunks"):
        asyncio.run(play(serving, "w*4"))


def test_video_and_report_hold_the_whole_session(serving: Serving, tmp_path: Path) -> None:
    playback = asyncio.run(play(serving, "w*2,j"))
    write_video(playback, tmp_path / "videos/session.mp4")
    write_report(playback.report, tmp_path / "latency.json")
    with av.open(tmp_path / "videos/session.mp4") as container:
        assert container.streams.video[0].average_rate == 80
        assert sum(1 for _ in container.decode(video=0)) == 24
    report = json.loads((tmp_path / "latency.json").read_text())
    assert report["action_to_frame_seconds"]["samples"] == 3
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["latency.json", "session.mp4"]


@pytest.mark.parametrize("key", KEYS)
def test_a_held_key_lights_up_and_nothing_else_changes(key: str) -> None:
    frame = np.random.default_rng(1).integers(0, 256, (96, 128, 3), np.uint8)
    idle, held = draw_keys(frame, ()), draw_keys(frame, {key})
    assert idle.shape == held.shape == (480, 640, 3)
    rows, columns = np.nonzero((idle != held).any(axis=-1))
    assert 100 < len(rows) < 3000
    assert np.ptp(rows) < 50
    assert np.ptp(columns) < 50
    assert (columns.mean() < 320) == (key in {"w", "a", "s", "d", "u", "dn"})
