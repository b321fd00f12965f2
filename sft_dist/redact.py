"""Secrets stay out of config dumps, logs and trackers: what looks like one becomes `***`.

A secret is known by its place (the password of a URL, what follows `Authorization:`), by its shape (`hf_...`) or by
the environment, where variables such as WANDB_API_KEY hold it. Every pattern is anchored at a literal and bounded, so
that a long text takes linear time.
"""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# The user stays: it tells which account was meant. Greedy up to the last @ before the path, as URLs are read.
_URL_PASSWORD = re.compile(r"(://[^\s/:@]{0,256}:)[^\s/]{1,1024}@")
_AUTHORIZATION = re.compile(
    r"(?i)(\bauthorization[\"']?\s{0,4}[:=]\s{0,4}[\"']?)(?:(?:bearer|basic|token)\s+)?[^\s\"',;]+"
)
# The digit keeps "bearer responsibilities" whole.
_BEARER = re.compile(r"(?i)(\bbearer\s{1,4})(?=[^\s\d]{0,256}\d)[\w.~+/=-]{16,}")
_WANDB_KEY = re.compile(r"(?i)(wandb[^\n]{0,24}?(?<![0-9a-z]))[0-9a-f]{40}(?![0-9a-z])")
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}"
    r"|sk-(?=[A-Za-z_-]{0,64}[0-9])[A-Za-z0-9_-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{20,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])"
    r"|AIza[A-Za-z0-9_-]{35}"
    r"|wandb_v[0-9]_[A-Za-z0-9_]{20,}"
    r"|eyJ[A-Za-z0-9_-]{10,1024}\.eyJ[A-Za-z0-9_-]{10,4096}\.[A-Za-z0-9_-]*"
    r")"
)
# TOKENIZERS_PARALLELISM holds no token, and HF_TOKEN_PATH only says where one is.
_SECRET_VARIABLE = re.compile(r"(?:TOKEN(?!I)|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY(?!_ID))", re.I)
_PLACE_VARIABLE = re.compile(r"_(?:FILE|PATH|DIR|URL|URI|ENDPOINT|NAME|ID|TIMEOUT)$", re.I)
MIN_SECRET_LENGTH = 8
"""A shorter value of a secret variable is an ordinary word elsewhere (`1`, `true`, `none`)."""

# `eos_token` and `pack_tokens` are no secrets.
_SECRET_KEY = re.compile(r"(?:.*[_-])?(?:api_?key|password|passwd|secret|(?:access|auth|hf|hub)_token)", re.I)


def redacted(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text with every secret replaced by `***`. environ: where secrets are known from; default: this process's."""
    for secret in _secrets(os.environ if environ is None else environ):
        text = text.replace(secret, HIDDEN)
    text = _URL_PASSWORD.sub(rf"\1{HIDDEN}@", text)
    text = _AUTHORIZATION.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    text = _WANDB_KEY.sub(rf"\1{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def redacted_tree(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of plain data (dicts, lists, scalars) whose strings are redacted, and whose values under `password`,
    `api_key` and the like are hidden whatever they are."""
    if isinstance(value, str):
        return redacted(value, environ)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN
            if inner is not None and isinstance(key, str) and _SECRET_KEY.fullmatch(key)
            else redacted_tree(inner, environ)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted_tree(inner, environ) for inner in value]
    return value


class RedactingFilter(logging.Filter):
    """Redacts message, traceback and stack of each record. Add it to a handler: a logger's own filters do not see the
    records of its children."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        clean = redacted(message)
        if clean != message:
            record.msg, record.args = clean, None
        if record.exc_info and not record.exc_text:
            # A formatter takes this text instead of writing the traceback itself.
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redacted(record.exc_text)
        if record.stack_info:
            record.stack_info = redacted(record.stack_info)
        return True


def _secrets(environ: Mapping[str, str]) -> list[str]:
    """Values of the variables that hold secrets, the longest first: one may begin with another."""
    values = {
        value
        for name, value in environ.items()
        if len(value) >= MIN_SECRET_LENGTH and _SECRET_VARIABLE.search(name) and not _PLACE_VARIABLE.search(name)
    }
    return sorted(values, key=len, reverse=True)
