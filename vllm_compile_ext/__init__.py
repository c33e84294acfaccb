"""vllm-compile-ext: vLLM's compilation package, rebuilt around start-up time.

Importing this package costs nothing and changes nothing: `vllm_compile_ext.plugin.register`, which vLLM calls in each
of its processes, does the work.
"""

__version__ = "0.1.0"
