"""Findings for people, and as JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.doctor.finding import Finding, Verdict
from sft_dist.redact import redacted

STYLES = {Verdict.OK: "green", Verdict.NOTE: "cyan", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red"}
NAME_WIDTH = 18


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """One table a group, and what is to be done at the end."""
    for group in dict.fromkeys(finding.group for finding in findings):
        console.print(Text(f"\n{group}", style="bold"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(width=len("problem"), no_wrap=True)
        table.add_column(width=NAME_WIDTH, overflow="fold")
        table.add_column(overflow="fold", ratio=1)
        for finding in findings:
            if finding.group == group:
                seen = Text(redacted(finding.seen))
                if finding.mend:
                    seen.append(f"\n-> {redacted(finding.mend)}", style="italic")
                table.add_row(Text(finding.verdict.value, style=STYLES[finding.verdict]), Text(finding.name), seen)
        console.print(table)
    console.print(Text(f"\n{summary(findings)}", style="bold"))


def summary(findings: Sequence[Finding]) -> str:
    """How many of each verdict, and whether a run can begin."""
    count = Counter(finding.verdict for finding in findings)
    counted = ", ".join(
        f"{count[v]} {v.value}{'s' * (count[v] != 1)}" for v in (Verdict.PROBLEM, Verdict.WARNING, Verdict.NOTE)
    )
    end = "mend the problems before you train" if count[Verdict.PROBLEM] else "nothing stands against a run"
    return f"{counted}, {count[Verdict.OK]} ok: {end}"


def to_json(findings: Sequence[Finding]) -> str:
    """`{"problems": n, "findings": [{group, name, verdict, seen, mend}]}`"""
    listed = [{key: redacted(value) for key, value in asdict(finding).items()} for finding in findings]
    problems = sum(finding.verdict is Verdict.PROBLEM for finding in findings)
    return json.dumps({"problems": problems, "findings": listed}, indent=2, ensure_ascii=False)
