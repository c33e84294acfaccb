"""Two starts on one store, each in a home of its own, as a container's is: the second compiles no Triton kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import engine
from vllm_compile_ext.store import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

# Kernels are made for arguments of some divisibility: the number of blocks must not depend on the memory that is free.
OPTIONS = {"dtype": "bfloat16", "num_gpu_blocks_override": 512}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of every kernel; a kernel that is compiled again writes its files again."""
    found = [path for kernel in kernels.find(folder) for path in kernel.path.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("processes", ["one", "several"])
def test_the_second_start_compiles_no_kernel(processes: str, llama2: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    jit = root / "compile_store/v1/jit"

    def start(name: str) -> tuple[engine.Run, dict[str, tuple[int, int]]]:
        home = tmp_path / name
        home.mkdir()
        env = {"HOME": str(home), "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes == "several"))}
        run = engine.run(llama2, root, OPTIONS, TRITON_CACHE_DIR=None, TRITON_HOME=None, **env)
        assert not (home / ".triton").exists(), "nothing is kept where a container loses it"
        return run, files(jit)

    first, made = start("first")
    names = {Path(name).stem for name in made if name.endswith(".cubin")}
    assert {name for name in names if not name.startswith("triton_")}, "not only Inductor's: the sampler's too"
    elsewhere = {path for path in root.rglob("*.cubin") if not path.is_relative_to(jit)}
    assert elsewhere == set(), "nothing is kept in the model's folder"

    second, found = start("second")
    assert found.keys() - made.keys() == set(), "new kernels"
    assert found == made, "kernels that were compiled again"
    assert second.tokens == first.tokens
    if processes == "one":  # counters of the engine's own process
        assert (first.loaded, second.loaded, second.compiled) == (0, 1, 0)
