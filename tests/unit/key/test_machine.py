"""What of the machine counts: parsed from what the system prints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_compile_ext.key import machine
from vllm_compile_ext.key.factors import EXCLUDED

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu tsc sse2 ssse3 constant_tsc smep avx2 avx512f avx512_bf16 amx_tile hypervisor fma f16c bmi2
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: sse2
"""
GCC = """Using built-in specs.
COLLECT_GCC=g++
Target: x86_64-linux-gnu
Configured with: ../src/configure -v --with-pkgversion='Debian 12.2.0-14+deb12u1' --prefix=/usr
Thread model: posix
gcc version 12.2.0 (Debian 12.2.0-14+deb12u1)
"""
CLANG = """Ubuntu clang version 18.1.3 (1ubuntu1)
Target: x86_64-pc-linux-gnu
InstalledDir: /usr/bin
"""


def test_flags_are_instruction_sets_of_one_processor() -> None:
    expected = ("amx_tile", "avx2", "avx512_bf16", "avx512f", "bmi2", "f16c", "fma", "sse2", "ssse3")
    assert machine.flags_in(CPUINFO) == expected
    assert machine.flags_in("Features\t: fp asimd sve2 bf16 cpuid\n") == ("asimd", "bf16", "fp", "sve2")
    assert machine.flags_in("nothing of the kind") == ()


def test_a_compiler_is_its_version_and_target() -> None:
    assert machine.compiler_in(GCC) == "gcc 12.2.0 (Debian 12.2.0-14+deb12u1), x86_64-linux-gnu"
    assert machine.compiler_in(CLANG) == "Ubuntu clang 18.1.3 (1ubuntu1), x86_64-pc-linux-gnu"
    assert machine.compiler_in("icx, the third") != machine.compiler_in("icx, the fourth")


def test_sources_count_and_their_place_does_not(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "sub").mkdir(parents=True)
    (one / "a.py").write_text("x = 1\n")
    (one / "sub" / "b.py").write_text("y = 2\n")
    shutil.copytree(one, two)
    (two / "notes.txt").write_text("not code")
    assert machine.sources(one) == machine.sources(two)
    (two / "sub" / "b.py").rename(two / "sub" / "c.py")
    machine.sources.cache_clear()
    renamed = machine.sources(two)
    (two / "a.py").write_text("x = 2\n")
    machine.sources.cache_clear()
    assert len({machine.sources(one), renamed, machine.sources(two)}) == 3


def test_flags_of_the_interpreter_count_but_for_the_listed_ones() -> None:
    code = "import json; from vllm_compile_ext.key import machine; print(json.dumps(machine.flags()))"

    def flags(*options: str) -> dict[str, str]:
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, check=True)
        return {name: value for name, value in json.loads(done.stdout).items() if f"flags.{name}" not in EXCLUDED}

    plain = flags()
    assert len(machine.flags()) == sys.flags.n_fields
    assert flags("-q", "-B", "-b", "-X", "warn_default_encoding") == plain
    for options in (["-O"], ["-OO"], ["-X", "utf8"], ["-X", "dev"]):
        assert flags(*options) != plain


def test_packages_that_are_not_there_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", "pytest no_such_module a.b")
    machine.packages.cache_clear()
    try:
        assert machine.packages() == {"pytest": pytest.__version__}
    finally:
        machine.packages.cache_clear()
