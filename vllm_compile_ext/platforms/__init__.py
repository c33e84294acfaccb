"""What differs from platform to platform; nothing here imports torch or vLLM before it is called."""

from vllm_compile_ext.platforms.cpu import keep_mode_on_cpu
from vllm_compile_ext.platforms.name import name, possible

__all__ = ["keep_mode_on_cpu", "name", "possible"]
