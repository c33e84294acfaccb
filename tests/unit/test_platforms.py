"""What this machine can run, found without torch."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_compile_ext import platforms

SYSTEM = platforms._system()
CPU = f"{SYSTEM} {platforms._cpu()}"


def machine(patch: pytest.MonkeyPatch, present: str, gpus: list[tuple[int, int]]) -> None:
    """A machine with this device, whose NVIDIA driver knows `gpus` by compute capability; without any it fails."""

    def fill(values: Any, numbers: Any) -> int:
        for value, number in zip(values, numbers, strict=True):
            value._obj.value = number
        return 0

    library = SimpleNamespace(
        nvmlInit_v2=lambda: 0 if gpus else 9,
        nvmlShutdown=lambda: 0,
        nvmlDeviceGetCount_v2=lambda count: fill([count], [len(gpus)]),
        nvmlDeviceGetHandleByIndex_v2=lambda index, device: fill([device], [index + 1]),
        nvmlDeviceGetCudaComputeCapability=lambda device, *values: fill(values, gpus[device.value - 1]),
    )
    patch.setattr(Path, "exists", lambda path: str(path) == present)
    patch.setattr(ctypes, "CDLL", lambda name: library)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("", [], {CPU}),
        # One with NVIDIA's GPUs can run vLLM for CPU too.
        ("/dev/nvidiactl", [(9, 0), (8, 9), (9, 0)], {CPU, f"{SYSTEM} cuda sm_90", f"{SYSTEM} cuda sm_89"}),
        # GPUs that cannot be asked.
        ("/dev/nvidiactl", [], None),
        ("/dev/kfd", [], None),
    ],
)
def test_what_a_machine_can_run(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: list[tuple[int, int]], expected: set[str] | None
) -> None:
    machine(monkeypatch, device, gpus)
    assert platforms.possible() == expected


@pytest.mark.parametrize(
    ("kind", "runs", "expected"),
    [
        # Torch is not asked: it would start CUDA in a process that may be about to fork.
        ("cuda", False, "cuda sm_89"),
        ("rocm", False, "hip gfx942"),
        ("cpu", False, platforms._cpu()),
        ("xpu", False, platforms._cpu()),
        # Where CUDA is running the current GPU counts.
        ("cuda", True, "cuda sm_90"),
        ("rocm", True, "hip gfx942:xnack-"),
    ],
)
def test_the_name_of_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str, runs: bool, expected: str) -> None:
    cuda = SimpleNamespace(is_initialized=lambda: runs)
    if runs:
        cuda.get_device_capability = lambda: (9, 0)
        cuda.get_device_properties = lambda index: SimpleNamespace(gcnArchName="gfx942:xnack-")
    platform = SimpleNamespace(
        is_rocm=lambda: kind == "rocm",
        is_cuda=lambda: kind == "cuda",
        get_device_capability=lambda: SimpleNamespace(major=8, minor=9),
    )
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip="6.4" if kind == "rocm" else None))
    vllm = SimpleNamespace(current_platform=platform, rocm=SimpleNamespace(_GCN_ARCH="gfx942"))
    for module, put in (("torch", torch), ("vllm", object()), ("vllm.platforms", vllm)):
        monkeypatch.setitem(sys.modules, module, put)  # type: ignore[arg-type]
    assert platforms.name() == f"{SYSTEM} {expected}"


def test_the_machine_of_this_test() -> None:
    possible = platforms.possible()
    assert possible is None or platforms.name() in possible
