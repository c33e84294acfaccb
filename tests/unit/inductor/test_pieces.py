"""Who compiles which piece; Inductor and vLLM's backend are stand-ins."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_compile_ext.inductor import pieces, workers
from vllm_compile_ext.inductor.pieces import DistinctPieces
from vllm_compile_ext.program import program
from vllm_compile_ext.store.store import Store, key_of

COUNT = 3
WAITED: list[int] = []  # for kernels
KEYS = [key_of({"piece": str(number)}) for number in range(COUNT)]


class Rank:
    """A process with `COUNT` pieces, which notes those that it lowers."""

    def __init__(self, store: Store, before: Callable[[], object] = lambda: None) -> None:
        self.lowered: list[int] = []
        self.before = before
        self.additional_config: dict[str, Any] = {}
        modules = [torch.nn.Module() for _ in range(COUNT)]
        for module in modules:
            module.graph = SimpleNamespace(find_nodes=lambda op: [])
        backend, facts = SimpleNamespace(vllm_config=self), {"model": "m", "key": "p" * 64}
        self.pieces = DistinctPieces(backend, modules, store, KEYS, facts)  # type: ignore[arg-type]

    def lower(self, number: int) -> str:
        self.before()
        self.lowered.append(number)
        return f"piece {number}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    @contextmanager
    def compiling(count: int) -> Iterator[Any]:
        yield SimpleNamespace(wait=lambda: WAITED.append(count))

    WAITED.clear()

    def keep(store: Store, piece: str, constants: list[Any]) -> Any:
        return {"code/(1, 8)": store.put(piece.encode())}

    monkeypatch.setattr(workers, "compiling", compiling)
    monkeypatch.setattr(pieces, "PiecewiseBackend", lambda module, rank, number, *args, **options: rank.lower(number))
    monkeypatch.setattr(program, "keep_piece", keep)
    monkeypatch.setattr(program, "load_code", lambda store, blob: store.get(blob).decode())
    monkeypatch.setattr(program, "loaded_piece", lambda backend, number, count, symbols, code: code["(1, 8)"])
    return Store.open(tmp_path / "store")


def nothing() -> None:
    pass


def test_each_piece_is_compiled_by_one_of_two_ranks(store: Store) -> None:
    began, has_the_rest = threading.Event(), threading.Event()

    def lowering() -> None:
        began.set()
        assert has_the_rest.wait(30)

    slow, quick = Rank(store, lowering), Rank(store)
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(slow.pieces.compile(nothing)))
    thread.start()
    assert began.wait(30)
    made.append(quick.pieces.compile(has_the_rest.set))
    thread.join(30)
    assert made == [["piece 0", "piece 1", "piece 2"]] * 2
    assert (slow.lowered, quick.lowered) == ([0], [1, 2])
    assert (slow.pieces.loaded, quick.pieces.loaded) == (2, 1)


def test_a_damaged_one_is_compiled_again_and_a_line_says_so_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    Rank(store).pieces.compile(nothing)
    (manifest,) = [m for m in store.manifests() if m.key == KEYS[1]]
    store.path(manifest.members["code/(1, 8)"]).write_bytes(b"")
    rank = Rank(store)
    assert rank.pieces.compile(nothing) == ["piece 0", "piece 1", "piece 2"]
    assert rank.lowered == [1]
    assert caplog.text.count("compiling one piece again: ") == 1
    again = Rank(store)
    again.pieces.compile(nothing)
    assert (again.lowered, sorted(again.pieces.kept)) == ([], [0, 1, 2])


def test_when_the_check_fails_nothing_is_kept_and_others_may_compile(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        Rank(store).pieces.compile(lambda: 1 // 0)
    assert len(WAITED) == 1, "kernels that Inductor remembers are not cancelled"
    assert list(store.manifests()) == []
    for key in KEYS:
        with store.writer(key, 0) as mine:
            assert mine


def test_what_cannot_be_written_is_compiled_and_progress_is_noted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "keep_piece", lambda *args: 1 / 0)
    noted: list[Any] = []
    monkeypatch.setattr(pieces, "event", lambda name, **facts: noted.append((name, *facts.values())))
    rank = Rank(store)
    assert rank.pieces.compile(nothing) == ["piece 0", "piece 1", "piece 2"]
    assert (rank.lowered, rank.pieces.kept) == ([0, 1, 2], {})
    assert noted[0] == ("progress", 1, 3, "distinct pieces, lowering")
    assert noted[-1] == ("progress", 3, 3, "distinct pieces, waiting for kernels")
