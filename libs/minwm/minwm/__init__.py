"""minwm: camera-controllable world models, from data to streamed session.

The library knows no service and no pipeline; both stand on it.
"""

__version__ = "0.1.0"
