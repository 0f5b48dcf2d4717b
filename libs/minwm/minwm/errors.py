"""The exception tree of the library.

    MinwmError
    ├── ConfigError        a recipe or option is wrong: names the field, the value and the expectation
    ├── TrajectoryError    a trajectory or control cannot be read
    ├── DataError          an episode, clip, shard or manifest is damaged, empty or foreign
    ├── InputError         what a model was given does not fit it: latents, conditions, a prompt
    ├── CheckpointError    weights do not fit the model that is to load them
    ├── ArtifactError      the store or the registry lacks, or refuses, an artifact
    ├── TrainingError      a run cannot go on (a loss that is not finite, a resume that does not fit)
    └── SessionError       a session cannot do what it was asked

The command line prints the message of a `MinwmError` without a traceback; the session service maps
each class to one gRPC status. Anything else is a bug of ours.
"""


class MinwmError(Exception):
    """Base of every error that is somebody's input rather than our bug."""


class ConfigError(MinwmError):
    """A recipe or option is wrong."""


class TrajectoryError(MinwmError):
    """A trajectory string or a control is wrong."""


class DataError(MinwmError):
    """An episode, clip, shard or manifest is damaged, empty or foreign."""


class InputError(MinwmError):
    """What a model was given does not fit it."""


class CheckpointError(MinwmError):
    """Weights do not fit the model."""


class ArtifactError(MinwmError):
    """The artifact store or the model registry lacks, or refuses, an artifact."""


class TrainingError(MinwmError):
    """A training run cannot go on."""


class SessionError(MinwmError):
    """A session cannot do what it was asked."""
