"""``python -m vllm_compile_ext.cli``, for where the script is not on the path."""

from vllm_compile_ext.cli import app

if __name__ == "__main__":
    app()
