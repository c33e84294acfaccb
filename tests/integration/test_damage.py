"""Damaged caches: a warning names the file, the code is compiled again, and the engine answers as before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def made(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, engine.Run]:
    """A cache root that a cold start has filled, and that start."""
    root = tmp_path_factory.mktemp("made") / "root"
    return root, engine.run(llama2, root)


def _artifact(root: Path) -> Path:
    (path,) = root.glob("torch_compile_cache/torch_aot_compile/*/rank_0_0/model")
    return path


def _kernel(root: Path) -> Path:
    return sorted(root.glob("torch_compile_cache/torch_aot_compile/*/inductor_cache/*/*.main.so"))[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unreadable(path: Path) -> None:
    # A folder in its place: root, too, cannot read it as a file.
    path.unlink()
    path.mkdir()


def foreign(path: Path) -> None:
    path.write_bytes(b"not an artifact at all, but long enough to have a tail")


@pytest.fixture
def root(made: tuple[Path, engine.Run], tmp_path: Path) -> Path:
    """The filled cache, at the path that it was made at: compiled code names its files by absolute path."""
    backup = tmp_path / "backup"
    shutil.copytree(made[0], backup)
    yield made[0]
    shutil.rmtree(made[0])
    backup.rename(made[0])


@pytest.mark.parametrize("damage", [truncate, flip, unreadable, foreign])
def test_a_damaged_artifact(
    damage: Callable[[Path], None], root: Path, made: tuple[Path, engine.Run], llama2: Path
) -> None:
    path = _artifact(root)
    damage(path)
    run = engine.run(llama2, root)
    assert (run.loaded, run.counters["num_aot_compiles"]) == (0, 1)
    assert run.output.lines("WARNING", "compiling again", str(path))
    assert run.tokens == made[1].tokens
    if damage is truncate:
        again = engine.run(llama2, root)
        assert (again.loaded, again.compiled) == (1, 0), "the artifact has been replaced by a sound one"


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_kernel(
    damage: Callable[[Path], None], root: Path, made: tuple[Path, engine.Run], llama2: Path
) -> None:
    path = _kernel(root)
    damage(path)
    run = engine.run(llama2, root)
    assert run.output.lines("WARNING", "compiling one file again", str(path))
    assert (run.loaded, run.compiled) == (1, 0)
    assert run.tokens == made[1].tokens


def test_forced_loading_makes_damage_an_error(root: Path, llama2: Path) -> None:
    path = _artifact(root)
    flip(path)
    with pytest.raises(AssertionError, match="VLLM_FORCE_AOT_LOAD=1, but there is no sound artifact"):
        engine.run(llama2, root, VLLM_FORCE_AOT_LOAD="1")


def test_the_older_cache_without_aot(llama2: Path, tmp_path: Path) -> None:
    """``VLLM_USE_AOT_COMPILE=0``: Dynamo's bytecode hook and upstream's index of compiled pieces."""
    root, env = tmp_path / "root", {"VLLM_USE_AOT_COMPILE": "0"}
    cold = engine.run(llama2, root, VLLM_COMPILE_DEPYF="1", **env)
    assert cold.counters["num_cache_entries_updated"] == 3
    assert cold.decompiled == ["forward"]
    assert "def forward" in (Path(cold.folder) / "transformed_code.py").read_text()

    index = Path(cold.folder) / "vllm_compile_cache.py"
    piece = sorted(Path(cold.folder).glob("artifact_*"))[0]
    index_text = index.read_text()
    truncate(index)
    run = engine.run(llama2, root, **env)
    assert run.output.lines("WARNING", "compiling again", str(index))
    assert run.tokens == cold.tokens
    assert run.decompiled == []

    index.write_text(index_text)
    shutil.rmtree(piece) if piece.is_dir() else truncate(piece)
    run = engine.run(llama2, root, **env)
    assert run.output.lines("WARNING", "compiling again", piece.name)
    assert run.tokens == cold.tokens
