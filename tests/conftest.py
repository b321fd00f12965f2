"""Session fixtures, and the rule that nothing is skipped in silence."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# New examples on each run, however long one takes; under REQUIRE_ALL=1 the same ones on every machine.
settings.register_profile("search", deadline=None)
settings.load_profile("ci" if os.environ.get("REQUIRE_ALL") == "1" else "search")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With REQUIRE_ALL=1 a skip is a failure, except for tests that need a GPU."""
    report = yield
    if report.skipped and os.environ.get("REQUIRE_ALL") == "1" and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped under REQUIRE_ALL=1: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums are the same, bit for bit, only with the same number of threads; processes that tests start have one too."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def no_wandb_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no settings, no service of a user's own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Qwen2 with tied embeddings, and its tokenizer."""
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an lm_head of its own."""
    return tiny.write_model(tmp_path_factory.mktemp("models") / "untied", tied=False)
