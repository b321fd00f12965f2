"""Every error a user can meet, in one tree.

SftDistError            what was given, what was expected, what to do
  ConfigError           the recipe or the command line: exit code 2, before any device work
  DataError             a file, a row or a template: exit code 2, names file and line
  BackendError          this machine or this model cannot do what was asked: exit code 2
  CheckpointError       a checkpoint is missing, broken or does not belong to this run: exit code 2
  OutOfMemoryError      host or device memory ran out: exit code 3, names the part that grew
"""


class SftDistError(Exception):
    """Base of all errors whose message is meant for the user; printed without a traceback."""

    exit_code = 2


class ConfigError(SftDistError):
    """A recipe key, an override or an environment that contradicts the recipe."""


class DataError(SftDistError):
    """Data that cannot be read, parsed, rendered or verified."""


class BackendError(SftDistError):
    """An engine, attention backend or model that cannot compute what the recipe promises."""


class CheckpointError(SftDistError):
    """A checkpoint that is absent, incomplete or from another run."""


class OutOfMemoryError(SftDistError):
    """Memory ran out during a step; the message proposes a smaller `batch.pack_tokens`."""

    exit_code = 3
