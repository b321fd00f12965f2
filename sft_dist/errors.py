"""Every error a user can meet, in one tree.

SftDistError            what was given, what was expected, what to do
  ConfigError           the recipe or the command line: exit code 2, before any device work
  DataError             a file, a row or a template: exit code 2, names file and line
  BackendError          this machine or this model cannot do what was asked: exit code 2
    DeviceError           one process has no device; said by that process
  CheckpointError       a checkpoint is missing, broken or does not belong to this run: exit code 2
  OutOfMemoryError      host or device memory ran out: exit code 3, names the part that grew
  NotFiniteError        too many steps in a row had no finite loss or gradient: exit code 4
  RankLostError         a process of the run died or hangs: exit code 5, names it
"""


class SftDistError(Exception):
    """Base of all errors whose message is meant for the user; printed without a traceback."""

    exit_code = 2
    is_local = False
    """True: only the rank that met it knows, and says it. Else every rank meets it alike, and rank 0 speaks for all."""

    is_said = False
    """True once the user was told."""


class ConfigError(SftDistError):
    """A recipe key, an override or an environment that contradicts the recipe."""


class DataError(SftDistError):
    """Data that cannot be read, parsed, rendered or verified."""


class BackendError(SftDistError):
    """An engine, attention backend or model that cannot compute what the recipe promises."""


class DeviceError(BackendError):
    """A process without a device of its own."""

    is_local = True


class CheckpointError(SftDistError):
    """A checkpoint that is absent, incomplete or from another run."""


class OutOfMemoryError(SftDistError):
    """Memory ran out during a step; the message proposes a smaller `batch.pack_tokens`."""

    exit_code = 3
    is_local = True


class NotFiniteError(SftDistError):
    """Step after step was withheld; the message names the examples of the last one."""

    exit_code = 4


class RankLostError(SftDistError):
    """Another process of the run died, left or hangs; the message names it, its host and its last step."""

    exit_code = 5
    is_local = True
