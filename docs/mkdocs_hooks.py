"""The site mirrors the repository, so that one relative link works here, on a code host and in an editor.

README.md, CONTRIBUTING.md, CHANGELOG.md, benchmarks/README.md, docs/*    pages and pictures under the same paths
sft_dist/shape.py, recipes, scripts ... that a page links to              a page with the source, <path>.md
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
SHOWN = {".md", ".svg", ".png", ".css"}
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".json": "json", ".ipynb": "json"}
# [text](target) and [text](target#heading); not those of other hosts, nor of the page itself.
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")

FETCHED = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=.?https?:|<link\b[^>]*\bhref=.?https?:")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take pages under their paths in the repository, and the theme's own files as they are."""
    shown = [path for path in sorted((ROOT / "docs").iterdir()) if path.suffix in SHOWN]
    pages = [*OUTSIDE, *(path.relative_to(ROOT).as_posix() for path in shown)]
    theirs = [file for file in files if Path(file.src_dir or ".") != Path(config.docs_dir)]
    mirrored = [
        File(path, src_dir=str(ROOT), dest_dir=config.site_dir, use_directory_urls=config.use_directory_urls)
        for path in pages
    ]
    sources = sorted({source for page in pages if page.endswith(".md") for source in _sources_of(page)})
    return Files([*theirs, *mirrored, *(_source_page(source, config) for source in sources)])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to source files lead to the pages that show them."""

    def to_page(link: re.Match[str]) -> str:
        source = _target(page.file.src_uri, link.group(1))
        return f"{link.group(1)}.md" if _is_source(source) else link.group()

    return LINK.sub(to_page, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from the network: links may lead there, pages must not need it."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from the network: {found.group()}")
    return output


def _sources_of(page: str) -> set[str]:
    targets = {_target(page, link.group(1)) for link in LINK.finditer((ROOT / page).read_text(encoding="utf-8"))}
    return set(filter(_is_source, targets))


def _target(page: str, link: str) -> str:
    """The path in the repository that a link of a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _is_source(path: str) -> bool:
    return not path.startswith("..") and (ROOT / path).is_file() and Path(path).suffix not in SHOWN


def _source_page(path: str, config: MkDocsConfig) -> File:
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    content = f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"
    return File.generated(config, f"{path}.md", content=content)
