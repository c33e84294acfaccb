"""Which configurations keep upstream's path of compilation; vLLM's own configuration objects, no engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.process import run

CODE = """
    import os
    import torch
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig
    from vllm_compile_ext.compilation.rules import why_upstream
    out = {}
    def why(name, env=None, later=None, **compilation):
        os.environ.update(env or {})
        options = {"mode": CompilationMode.VLLM_COMPILE} | compilation
        config = VllmConfig(compilation_config=CompilationConfig(**options))
        for key, value in (later or {}).items():  # what CPU does not leave as it was asked for
            setattr(config.compilation_config, key, value)
        out[name] = why_upstream(config)
        for key in env or {}:
            del os.environ[key]
    why("default")
    why("compile sizes", compile_sizes=[1, 8])
    why("unbacked", dynamic_shapes_config={"type": "unbacked"})
    why("size oblivious", dynamic_shapes_config={"type": "backed_size_oblivious"})
    why("custom pass", inductor_passes={"post_grad_custom_post_pass": "__main__.why"})
    why("mode", mode=CompilationMode.DYNAMO_TRACE_ONCE)
    why("no cache", env={"VLLM_DISABLE_COMPILE_CACHE": "1"})
    why("no cache of a configuration", inductor_compile_config={"force_disable_caches": True})
    with torch._inductor.config.patch(force_disable_caches=True):
        why("no cache of torch's")
    why("no AOT", env={"VLLM_USE_AOT_COMPILE": "0"})
    why("no MEGA", env={"VLLM_USE_MEGA_AOT_ARTIFACT": "0"})
    why("no standalone", env={"VLLM_USE_STANDALONE_COMPILE": "0"})
    why("backend", later={"backend": "eager"})
    why("partition", later={"use_inductor_graph_partition": True})
    why("copies", later={"cudagraph_copy_inputs": True})
    why("guards", env={"VLLM_USE_BYTECODE_HOOK": "0"}, dynamic_shapes_config={"evaluate_guards": True})
    report(out)
"""

REASONS = {
    "default": None,
    "compile sizes": None,
    "unbacked": None,
    "size oblivious": None,
    "custom pass": None,
    "mode": "mode DYNAMO_TRACE_ONCE",
    "no cache": "VLLM_DISABLE_COMPILE_CACHE=1",
    "no cache of a configuration": "torch's compile caches are off",
    "no cache of torch's": "torch's compile caches are off",
    "no AOT": "VLLM_USE_AOT_COMPILE=0",
    "no MEGA": "VLLM_USE_MEGA_AOT_ARTIFACT=0",
    "no standalone": "VLLM_USE_STANDALONE_COMPILE=0",
    "backend": "backend 'eager'",
    "partition": "use_inductor_graph_partition",
    "copies": "cudagraph_copy_inputs",
    "guards": "evaluate_guards",
}


@pytest.fixture(scope="module")
def reasons() -> Any:
    outcome = run(CODE, fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


@pytest.mark.parametrize("name", REASONS)
def test_rule(reasons: dict[str, str | None], name: str) -> None:
    expected = REASONS[name]
    assert reasons[name] == expected or (expected and reasons[name].startswith(expected))
