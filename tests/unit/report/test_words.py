from __future__ import annotations

from typing import Any

import pytest

from vllm_compile_ext.record.read import Note
from vllm_compile_ext.report import words


@pytest.mark.parametrize(
    ("name", "attrs", "text"),
    [
        ("key", {"key": "b818f53c0d22aaaa", "shard": "rank_0"}, "the compile cache key is b818f53c0d22 (rank_0)"),
        ("miss", {"summary": "cache miss: torch 2.13.0 -> 2.13.1"}, "cache miss: torch 2.13.0 -> 2.13.1"),
        ("miss", {"changes": [["torch", "2.13.0", None], 5, ["x"]]}, "cache miss: torch 2.13.0 -> unset"),
        ("miss", {"why": "cache miss: nothing is stored yet"}, "cache miss: nothing is stored yet"),
        ("loaded", {"pieces": 81, "ms": 21.3}, "loaded 81 compiled pieces in 21 ms"),
        ("compiled", {"pieces": 2, "loaded": 1}, "compiled 2 pieces; 1 piece of another model loaded"),
        ("miss", {}, "cache miss: nothing is stored under this key"),
        (
            "compiled",
            {"traced": 2, "copied": 78, "pieces": 81, "distinct": 3, "seconds": 8.9},
            "traced 2 layers and copied 78; compiled 81 pieces, 3 of them distinct in 8.9 s",
        ),
        ("compiled", {"pieces": 1}, "compiled 1 piece"),
        ("loaded", {"key": "b818f53c0d22aaaa", "seconds": 0.021}, "loaded compiled code of b818f53c0d22 in 21 ms"),
        ("kept", {"bytes": 312_004}, "kept compiled code for the next start, 312.0 kB"),
        ("graphs", {"kind": "FULL", "captured": 51, "bytes": 94e6}, "captured 51 FULL CUDA graphs, 94.0 MB"),
        (
            "graphs",
            {"shapes": 102, "kept_free": 720e6, "source": "an estimate"},
            "102 CUDA graphs on demand, 720.0 MB kept free for them (an estimate)",
        ),
        ("fallback", {"why": "layers do not agree"}, "as in stock vLLM: layers do not agree"),
        ("fallback", {}, "fallback"),
        ("new", {"a": 1, "b": [2]}, "new a=1 b=[2]"),
        ("graphs", {"captured": "many"}, "graphs captured=many"),
    ],
)
def test_notes(name: str, attrs: dict[str, Any], text: str) -> None:
    assert words.note(Note(time=1, pid=1, name=name, attrs=attrs)) == text


def test_of_several_models() -> None:
    note = Note(time=1, pid=1, name="compiled", attrs={"pieces": 1, "model": "LlamaModel"})
    assert words.note(note, models=True) == "LlamaModel: compiled 1 piece"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 ms"), (0.0123, "12 ms"), (0.9996, "1.0 s"), (83.62, "83.6 s"), (700, "11.7 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text
