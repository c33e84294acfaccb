import pytest

from vllm_compile_ext import versions


@pytest.mark.parametrize(
    ("vllm", "torch"),
    [
        *((vllm, "2.13.0+cpu") for vllm in ("0.32.0", "0.32.0+cpu", "0.32.1", "0.32.1rc1")),
        ("0.33.0", "2.14.0"),
        ("0.33.1+cpu", "2.14.1+cu130"),
    ],
)
def test_supported(vllm: str, torch: str) -> None:
    assert versions.unsupported(vllm, torch) is None


def test_each_supported_vllm_has_the_torch_that_it_is_built_for() -> None:
    pairs = [(f"{vllm}.0", f"{torch}.0") for vllm, torch in versions.BUILT_FOR.items()]
    assert not any(versions.unsupported(*pair) for pair in pairs)
    assert all(versions.unsupported(f"0.{n}.0", "2.13.0") for n in (31, 34))


@pytest.mark.parametrize(
    ("vllm", "torch", "named"),
    [
        ("0.31.0", "2.13.0", "vllm 0.31.0"),
        ("0.34.0", "2.14.0", "vllm 0.34.0"),
        ("0.33.0", "2.13.0", "torch 2.13.0 is not supported with vllm 0.33.0"),
        ("0.32.0", "2.14.0", "which is built for torch 2.13"),
        ("0.32.0", "2.12.1", "torch 2.12.1"),
        ("dev", "2.13.0", "vllm dev"),
    ],
)
def test_unsupported_names_what_was_found_and_what_is_supported(vllm: str, torch: str, named: str) -> None:
    reason = versions.unsupported(vllm, torch)
    assert reason is not None
    assert named in reason
    assert "is not supported" in reason
