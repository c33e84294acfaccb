from pathlib import Path

import pytest

from vllm_compile_ext.artifacts import seal


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "kernels").mkdir()
    kernel = tmp_path / "kernels" / "a.so"
    kernel.write_bytes(b"machine code")
    path = tmp_path / "model"
    path.write_bytes(seal.seal(b"payload" * 100, tmp_path, [kernel]))
    return path


def test_reads_back_what_was_sealed(sealed: Path) -> None:
    assert seal.read(sealed, sealed.parent) == (b"payload" * 100, [])


def test_payload_comes_first_so_that_stock_readers_see_it(sealed: Path) -> None:
    assert sealed.read_bytes().startswith(b"payload" * 100)


def test_every_truncation_is_noticed(sealed: Path) -> None:
    whole = sealed.read_bytes()
    for length in range(len(whole)):
        sealed.write_bytes(whole[:length])
        with pytest.raises(seal.DamagedError, match="model"):
            seal.read(sealed, sealed.parent)


def test_every_flipped_byte_is_noticed(sealed: Path) -> None:
    whole = sealed.read_bytes()
    for index in range(len(whole)):
        sealed.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        try:
            _, damaged = seal.read(sealed, sealed.parent)
        except seal.DamagedError:
            continue
        assert damaged, f"byte {index} of {len(whole)} was flipped unnoticed"


@pytest.mark.parametrize("content", [None, b"", b"machine kode"])
def test_a_damaged_needed_file_is_named(sealed: Path, content: bytes | None) -> None:
    kernel = sealed.parent / "kernels" / "a.so"
    kernel.unlink() if content is None else kernel.write_bytes(content)
    _, (bad,) = seal.read(sealed, sealed.parent)
    assert bad.path == kernel
    assert str(kernel) in str(bad)


def test_a_missing_artifact_is_not_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        seal.read(tmp_path / "model", tmp_path)
