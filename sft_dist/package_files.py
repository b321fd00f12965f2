"""Recipes, DeepSpeed and accelerate files that come with the package, in a checkout and in an installed wheel."""

from pathlib import Path

from sft_dist.errors import ConfigError

_PACKAGE = Path(__file__).parent
# A wheel carries configs/ inside the package; a checkout keeps it at the top, where people look.
CONFIGS = next(d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir())


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
