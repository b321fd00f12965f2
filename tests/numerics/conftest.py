"""One lab for all tests of this directory. It runs only what the selected tests ask for."""

from pathlib import Path

import pytest

from tests.numerics.lab import Case, Lab


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tied_model: Path) -> Lab:
    selected = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    return Lab.open(tmp_path_factory.mktemp("lab"), tied_model, [case for case in selected if isinstance(case, Case)])
