"""The files of a run's directory, by name."""

STOP_FILE = "STOP"
"""Whoever makes it asks the run to stop: all ranks finish the same step, save, and leave."""

INTERRUPTED = "INTERRUPTED"
"""Says that the run stopped on request, after which step, and why. Gone when the run goes on."""

LOCK = ".lock"
METRICS = "metrics.jsonl"
RUN_JSON = "run.json"
CONFIG = "config.yaml"
LOGS = "logs"
HEARTBEATS = "heartbeats"
CHECKPOINTS = "checkpoints"
MODEL = "model"
EVALUATION = "evaluation.json"
