"""`python -m sft_dist.doctor.ask_package MODULE [ATTRIBUTE]`: whether it can be imported. It may die of it."""

import importlib
import json
import sys


def main(module: str, attribute: str | None = None) -> None:
    found = importlib.import_module(module)
    has = attribute is None or hasattr(found, attribute)
    print(json.dumps({"version": getattr(found, "__version__", None), "has_attribute": has}))


if __name__ == "__main__":
    main(*sys.argv[1:])
