import os
from pathlib import Path

import pytest

from benchmarks import models

# Whether injected faults and random input run in full (`FULL=1`), or a short sample of them.
FULL = bool(os.environ.get("FULL"))

# The quick ones first, then the longest, so that processes that share the work end together.
ORDER = (
    *("unit", "contract", "browser", "fuzz"),
    *("integration/test_families", "integration/test_faults", "integration/test_serve", "integration", "gpu"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests, and keep those of a file in one process, for they share starts.

    Each family starts its own; all tests of GPUs share the memory.
    """
    root = Path(__file__).parent

    def kind(item: pytest.Item) -> str:
        return next(kind for kind in ORDER if str(item.path.relative_to(root)).startswith(kind))

    items.sort(key=lambda item: ORDER.index(kind(item)))
    for item in items:
        group = {"gpu": "gpu", "integration/test_families": item.nodeid}.get(kind(item), str(item.path))
        item.add_marker(pytest.mark.xdist_group(group))


def _llama(factory: pytest.TempPathFactory, layers: int, seed: int = 0) -> Path:
    """A Llama with seeded weights and a real tokenizer."""
    return models.llama(factory.mktemp("models") / f"llama{layers}", "llama8", num_hidden_layers=layers, seed=seed)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _llama(tmp_path_factory, 4)


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` with other weights."""
    return _llama(tmp_path_factory, 4, seed=1)


@pytest.fixture(scope="session")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, for tests that compile many times."""
    return _llama(tmp_path_factory, 2)
