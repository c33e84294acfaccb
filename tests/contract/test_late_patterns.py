"""A start that compiles nothing does not make Inductor's patterns."""

from __future__ import annotations

from tests.process import run

CODE = """
    import importlib.util, os
    from pathlib import Path
    from vllm_compile_ext import plugin
    plugin.register()
    from torch._inductor.fx_passes import joint_graph
    from vllm.compilation import compiler_interface
    made = []
    joint_graph.lazy_init = lambda input_device=None: made.append(input_device)

    def at_start(check=None):
        made.clear()
        os.environ.pop("VLLM_GPU_SYNC_CHECK", None)
        os.environ.update({"VLLM_GPU_SYNC_CHECK": check} if check else {})
        compiler_interface.trigger_inductor_lazy_init("the device")
        return list(made)

    out = [at_start(), at_start("warn"), at_start("error")]
    plugin.unregister()
    worker = Path(importlib.util.find_spec("vllm.v1.worker.gpu_worker").origin).read_text()
    report(out + [at_start(), "trigger_inductor_lazy_init(self.device)" in worker])
"""


def test_patterns_are_made_at_start_only_where_syncs_are_looked_for() -> None:
    outcome = run(CODE)
    assert outcome.code == 0, outcome.output[-5000:]
    quiet, warn, error, stock, called = outcome.value
    assert quiet == []
    assert warn == error == stock == ["the device"]
    assert called
