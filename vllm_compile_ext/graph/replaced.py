"""Whether submodules were replaced: what was found by walking a model holds until then."""

from __future__ import annotations

from typing import Any

_count = 0
_handle: Any = None


def count() -> int:
    """Submodules that were registered anywhere in this process since the first call."""
    if _handle is None:
        _watch()
    return _count


def _watch() -> None:
    from torch.nn.modules import module

    global _handle

    def registered(*_: Any) -> None:
        global _count
        _count += 1

    # torch calls it for `setattr` of a module, `add_module`, and the containers' item assignment.
    _handle = module.register_module_module_registration_hook(registered)


def forget() -> None:
    """Remove the hook."""
    global _handle
    if _handle is not None:
        _handle.remove()
    _handle = None
