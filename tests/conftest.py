from pathlib import Path

import pytest

from benchmarks import models


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers with seeded weights and a real tokenizer."""
    return models.llama(tmp_path_factory.mktemp("models") / "llama4", "llama8", num_hidden_layers=4)


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` with other weights."""
    return models.llama(tmp_path_factory.mktemp("models") / "other", "llama8", num_hidden_layers=4, seed=1)


@pytest.fixture(scope="session")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers, for tests that compile many times."""
    return models.llama(tmp_path_factory.mktemp("models") / "llama2", "llama8", num_hidden_layers=2)
