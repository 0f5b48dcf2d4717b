"""Settings of the whole test tree."""

from hypothesis import settings

# A busy machine makes a test slow, not wrong: pytest-timeout catches what hangs.
settings.register_profile("minwm", deadline=None, print_blob=True)
settings.load_profile("minwm")
