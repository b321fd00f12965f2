"""Templates of pages: one look for all, everything that comes from data escaped."""

from functools import lru_cache
from pathlib import Path

import jinja2

_PACKAGE = Path(__file__).parents[1]


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    folders = [str(_PACKAGE / "data"), str(_PACKAGE)]
    loader = jinja2.FileSystemLoader(folders, encoding="utf-8")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)


def page_template(name: str) -> jinja2.Template:
    """A template of this package; what it includes and imports lies beside it."""
    return _environment().get_template(name)
