"""What this machine can run, found without torch."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_compile_ext import platforms

CPU = f"{platforms._system()} {platforms._cpu()}"


def machine(patch: pytest.MonkeyPatch, *devices: str, gpus: list[tuple[int, int]] | None = None) -> None:
    """A machine with these files in /dev, whose NVIDIA driver knows `gpus` by compute capability; None: has none."""

    def fill(values: Any, numbers: Any) -> int:
        for value, number in zip(values, numbers, strict=True):
            value._obj.value = number
        return 0

    library = SimpleNamespace(
        nvmlInit_v2=lambda: 0 if gpus else 9,
        nvmlShutdown=lambda: 0,
        nvmlDeviceGetCount_v2=lambda count: fill([count], [len(gpus or ())]),
        nvmlDeviceGetHandleByIndex_v2=lambda index, device: fill([device], [index + 1]),
        nvmlDeviceGetCudaComputeCapability=lambda device, *values: fill(values, (gpus or [])[device.value - 1]),
    )
    patch.setattr(Path, "exists", lambda path: str(path) in devices)
    patch.setattr(ctypes, "CDLL", lambda name: library)


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert platforms.possible() == {CPU}


def test_one_with_nvidia_gpus_can_run_vllm_for_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "/dev/nvidiactl", gpus=[(9, 0), (8, 9), (9, 0)])
    assert platforms.possible() == {CPU, f"{platforms._system()} cuda sm_90", f"{platforms._system()} cuda sm_89"}


@pytest.mark.parametrize("device", ["/dev/nvidiactl", "/dev/kfd"])
def test_one_whose_gpu_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    machine(monkeypatch, device)
    assert platforms.possible() is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("cuda", "cuda sm_89"), ("rocm", "hip gfx942"), ("cpu", platforms._cpu()), ("xpu", platforms._cpu())],
)
def test_torch_is_not_asked_for_the_gpu_where_cuda_is_not_running(
    monkeypatch: pytest.MonkeyPatch, kind: str, expected: str
) -> None:
    """It would start CUDA in a process that may be about to fork."""
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False))
    platform = SimpleNamespace(
        is_rocm=lambda: kind == "rocm",
        is_cuda=lambda: kind == "cuda",
        get_device_capability=lambda: SimpleNamespace(major=8, minor=9),
    )
    vllm = SimpleNamespace(current_platform=platform, rocm=SimpleNamespace(_GCN_ARCH="gfx942"))
    for module, put in (("torch", torch), ("vllm", object()), ("vllm.platforms", vllm)):
        monkeypatch.setitem(sys.modules, module, put)  # type: ignore[arg-type]
    assert platforms.name() == f"{platforms._system()} {expected}"


@pytest.mark.parametrize(("hip", "expected"), [(None, "cuda sm_89"), ("6.4", "hip gfx942:xnack-")])
def test_where_cuda_is_running_the_current_gpu_counts(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, expected: str
) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        get_device_capability=lambda: (8, 9),
        get_device_properties=lambda index: SimpleNamespace(gcnArchName="gfx942:xnack-"),
    )
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=hip))
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    assert platforms.name() == f"{platforms._system()} {expected}"


def test_the_machine_of_this_test() -> None:
    possible = platforms.possible()
    assert possible is None or platforms.name() in possible
