"""Recipes, DeepSpeed and accelerate files and batch scripts that come with the package, checkout or wheel."""

import importlib.metadata
import platform
from pathlib import Path

import xxhash

from sft_dist import __version__
from sft_dist.errors import ConfigError

_PACKAGE = Path(__file__).parent


def _shipped(folder: str) -> Path:
    """A wheel carries it inside the package; a checkout keeps it at the top, where people look."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


CONFIGS = _shipped("configs")
SLURM = _shipped("slurm")


def find(name: str) -> Path:
    """The path of a shipped file such as `deepspeed/zero2.json`. Raises ConfigError naming its siblings."""
    path = CONFIGS / name
    if not path.is_file():
        siblings = ", ".join(sorted(p.name for p in path.parent.glob("*"))) or "none"
        raise ConfigError(f"no file configs/{name} comes with sft_dist; there are: {siblings}")
    return path


def recipes() -> list[Path]:
    """Shipped recipes, sorted by name."""
    return sorted((CONFIGS / "recipes").glob("*.yaml"))


def code_identity() -> dict[str, str]:
    """What computes: this package, by version and by a hash of its source, and the libraries under it."""
    digest = xxhash.xxh3_64()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + file.read_bytes())
    versions = {"sft_dist": f"{__version__}+{digest.hexdigest()}", "python": platform.python_version()}
    for name in ("torch", "transformers", "deepspeed"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
