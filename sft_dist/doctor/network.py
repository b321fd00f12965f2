"""Whether the hub and wandb can be reached from here, each by one bounded request."""

import netrc
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from sft_dist.doctor.environment import is_on
from sft_dist.doctor.finding import Finding, Group
from sft_dist.doctor.places import hub_home
from sft_dist.doctor.probe import ask_python
from sft_dist.redact import redacted

GROUP = Group("network")
ANSWER_S = 12.0
"""Longer than the request's own limit, which does not cover looking a name up."""

HUB, WANDB = "https://huggingface.co", "https://api.wandb.ai"


def check_network(*, wants_wandb: bool, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """wants_wandb: the recipe has a wandb section that is online; without one it is only told."""
    yield _hub(environ)
    yield from _wandb(environ, wants=wants_wandb)


def _hub(environ: Mapping[str, str]) -> Finding:
    if is_on(environ.get("HF_HUB_OFFLINE", "")):
        return GROUP.note(
            "hub", "not asked: HF_HUB_OFFLINE is set; the cache must have everything", "unset HF_HUB_OFFLINE"
        )
    url = environ.get("HF_ENDPOINT") or HUB
    shown = redacted(url, environ)
    if why := _why_unreachable(url, environ):
        mend = (
            "fetch on a machine that reaches it (sft-dist prepare recipe.yaml --with-model, with HF_HOME on a shared "
            "disk), then set HF_HUB_OFFLINE=1 here"
        )
        return GROUP.note("hub", f"{shown} does not answer: {why}", mend)
    has_token = (
        bool(environ.get("HF_TOKEN") or environ.get("HF_TOKEN_PATH")) or Path(hub_home(environ), "token").is_file()
    )
    return GROUP.ok(
        "hub", f"{shown} answers; {'a token is set' if has_token else 'no token is set: public models only'}"
    )


def _wandb(environ: Mapping[str, str], *, wants: bool) -> Iterator[Finding]:
    if find_spec("wandb") is None:
        mend = "pip install wandb, or leave the recipe's wandb section out; metrics.jsonl has everything"
        yield (GROUP.warning if wants else GROUP.note)("wandb", "the package is not installed", mend)
        return
    url = environ.get("WANDB_BASE_URL") or WANDB
    shown = redacted(url, environ)
    later = "wandb: {mode: offline} in the recipe, and sft-dist sync later; a run goes on without it in any case"
    if why := _why_unreachable(url, environ):
        yield GROUP.note("wandb", f"{shown} does not answer: {why}", later)
    elif has_key(url, environ):
        yield GROUP.ok("wandb", f"{shown} answers, and a key is set")
    else:
        make = GROUP.warning if wants else GROUP.note
        yield make("wandb", f"{shown} answers, but no key is set", f"wandb login, or {later}")


def _why_unreachable(url: str, environ: Mapping[str, str]) -> str:
    answer = ask_python("doctor.ask_reach", url, timeout_s=ANSWER_S, environ=environ)
    return redacted(answer.failure or str(answer.facts.get("error") or ""), environ)


def has_key(url: str, environ: Mapping[str, str]) -> bool:
    """A key of wandb, in the environment or in the netrc file. The key itself goes nowhere."""
    if environ.get("WANDB_API_KEY"):
        return True
    file = Path(environ.get("NETRC") or Path(environ.get("HOME") or "~", ".netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(urlsplit(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
