import pytest
from hypothesis import given
from hypothesis import strategies as st

from minwm.errors import DataError
from minwm.models.layout import LatentLayout

pytestmark = pytest.mark.unit

OURS = LatentLayout(channels=16, pixels=8, leading=False)
PUBLISHED = LatentLayout(channels=16, pixels=8, leading=True)

layouts = st.sampled_from([OURS, PUBLISHED])


@given(layout=layouts, latent_frames=st.integers(0, 10_000))
def test_latent_frames_is_the_inverse_of_rgb_frames(layout: LatentLayout, latent_frames: int) -> None:
    assert layout.latent_frames(layout.rgb_frames(latent_frames)) == latent_frames


@given(layout=layouts, frames=st.integers(0, 200))
def test_frames_either_make_whole_latent_frames_or_are_refused(layout: LatentLayout, frames: int) -> None:
    whole = {layout.rgb_frames(latent_frames) for latent_frames in range(60)}
    if frames in whole:
        assert layout.rgb_frames(layout.latent_frames(frames)) == frames
    else:
        with pytest.raises(DataError, match=f"frames={frames}: expected"):
            layout.latent_frames(frames)


@pytest.mark.parametrize(
    ("layout", "latent_frames", "rgb_frames"),
    [(OURS, 0, 0), (OURS, 1, 4), (OURS, 20, 80), (PUBLISHED, 0, 0), (PUBLISHED, 1, 1), (PUBLISHED, 20, 77)],
)
def test_a_leading_frame_has_a_latent_frame_of_its_own(
    layout: LatentLayout, latent_frames: int, rgb_frames: int
) -> None:
    assert layout.rgb_frames(latent_frames) == rgb_frames


@pytest.mark.parametrize(
    ("layout", "frames", "expected"), [(OURS, 77, "0 + a multiple of 4"), (PUBLISHED, 80, "1 + a multiple of 4")]
)
def test_the_error_says_what_was_expected(layout: LatentLayout, frames: int, expected: str) -> None:
    with pytest.raises(DataError) as error:
        layout.latent_frames(frames)
    assert str(error.value) == f"frames={frames}: expected {expected}"
