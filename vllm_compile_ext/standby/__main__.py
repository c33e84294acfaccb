"""What ``vllm-compile-ext standby`` becomes: a process that has imported nothing that `vllm serve` would not."""

import sys

if not sys.flags.safe_path:
    sys.path[0] = "/dev/null"  # this file's folder; `vllm serve` has another: `Files.hidden_by`

from vllm_compile_ext.standby.hold import CannotStandByError, hold

if __name__ == "__main__":
    try:
        run = hold(float(sys.argv[1]) if len(sys.argv) > 1 else None)
    except CannotStandByError as error:
        sys.exit(f"vllm-compile-ext: cannot stand by: {error}")
    run()
