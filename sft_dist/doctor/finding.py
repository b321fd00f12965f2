"""What was found, as data; how it is shown is for `report.py`."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """problem: a run will fail, or compute elsewhere than is meant. warning: slow, or fails at times. note: to know."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. seen: what was found, in words. mend: what to do; empty only where all is well."""

    group: str
    name: str
    verdict: Verdict
    seen: str
    mend: str = ""


@dataclass(frozen=True)
class Group:
    """Makes the findings of one group."""

    name: str

    def ok(self, name: str, seen: str) -> Finding:
        return Finding(self.name, name, Verdict.OK, seen)

    def note(self, name: str, seen: str, mend: str) -> Finding:
        return Finding(self.name, name, Verdict.NOTE, seen, mend)

    def warning(self, name: str, seen: str, mend: str) -> Finding:
        return Finding(self.name, name, Verdict.WARNING, seen, mend)

    def problem(self, name: str, seen: str, mend: str) -> Finding:
        return Finding(self.name, name, Verdict.PROBLEM, seen, mend)
