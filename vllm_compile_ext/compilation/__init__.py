"""The replacement for `vllm.compilation`: one module for each name of `vllm_compile_ext.swap.REPLACED`.

Thin by design: these modules adapt vLLM to the rooms beside this package and leave the rest to upstream's classes.
"""
