import os
from pathlib import Path

import pytest

from benchmarks import models

# Whether injected faults and random input run in full (`FULL=1`), or a short sample of them.
FULL = bool(os.environ.get("FULL"))

# The quick ones first; what is not named comes before all.
ORDER = ("unit", "contract", "browser", "fuzz", "integration", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests, and keep those of a file, which share starts, in one process; those of GPUs share the memory."""
    root = Path(__file__).parent
    kind = {item: item.path.relative_to(root).parts[0] for item in items}
    items.sort(key=lambda item: ORDER.index(kind[item]) if kind[item] in ORDER else -1)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("gpu" if kind[item] == "gpu" else str(item.path)))


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
