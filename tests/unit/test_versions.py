import pytest

from vllm_compile_ext import versions


@pytest.mark.parametrize("vllm", ["0.32.0", "0.32.0+cpu", "0.32.1", "0.32.1rc1"])
def test_supported(vllm: str) -> None:
    assert versions.unsupported(vllm, "2.13.0+cpu") is None


@pytest.mark.parametrize(
    ("vllm", "torch", "named"),
    [
        ("0.31.0", "2.13.0", "vllm 0.31.0"),
        ("0.33.0", "2.13.0", "vllm 0.33.0"),
        ("0.32.0", "2.12.1", "torch 2.12.1"),
        ("dev", "2.13.0", "vllm dev"),
    ],
)
def test_unsupported_names_what_was_found_and_what_is_supported(vllm: str, torch: str, named: str) -> None:
    reason = versions.unsupported(vllm, torch)
    assert reason is not None
    assert named in reason
    assert ">=" in reason
