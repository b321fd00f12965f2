"""What lint found, as a table with places below it, or as JSON."""

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.data.lint import SEVERITIES, LintReport
from sft_dist.data.shown import escape_json, safe

STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def print_report(report: LintReport, console: Console) -> None:
    """A line for each rule that found something, its first places, and the verdict."""
    if report.results:
        console.print(_overview(report))
    for rule, result in report.results.items():
        console.print(Text(f"\n{rule}", style=STYLES[SEVERITIES[rule]]), soft_wrap=True)
        for finding in result.first:
            place = f"{finding.origin}: " if finding.origin else ""
            console.print(Text("  " + safe(f"{place}{finding.detail}")), soft_wrap=True)
        if result.count > len(result.first):
            console.print(Text(f"  and {result.count - len(result.first)} more", style="dim"), soft_wrap=True)
    console.print(Text(f"{chr(10) if report.results else ''}verdict: {report.verdict}", style="bold"), soft_wrap=True)


def to_json(report: LintReport) -> str:
    """The report for machines; `findings` holds the first of `count`, which are about `rows` different rows."""
    rules = [
        {
            "rule": rule,
            "severity": SEVERITIES[rule],
            "count": result.count,
            "rows": result.num_rows,
            "share": report.share(rule),
            "findings": [
                {
                    "path": finding.origin.path if finding.origin else None,
                    "line": finding.origin.line if finding.origin else None,
                    "detail": finding.detail,
                }
                for finding in result.first
            ],
        }
        for rule, result in report.results.items()
    ]
    fields = {"verdict": report.verdict, "clean": report.is_clean, "rows": report.rows}
    fields |= {"held_out_rows": report.held_out_rows, "rules": rules}
    return escape_json(json.dumps(fields, indent=2, ensure_ascii=False))


def _overview(report: LintReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("rule", "severity", "count", "share"):
        table.add_column(name, justify="right" if name in ("count", "share") else "left")
    for rule, result in report.results.items():
        severity = SEVERITIES[rule]
        share = report.share(rule)
        shown = "" if share is None else f"{share:.1%}"
        table.add_row(rule, Text(severity, style=STYLES[severity]), str(result.count), shown)
    return table
