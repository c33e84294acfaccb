"""The one way to change an attribute of vLLM or torch, and to put it back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Undo = Callable[[], None]


def replace(owner: Any, name: str, around: Callable[[Any], Any]) -> Undo:
    """Put ``around(stock)`` in the place of `stock`, an attribute of `owner` or the item of a dict; returns the undo.

    around: gets the function itself where `owner` has it as a static or class method.  Where it returns `stock`,
    nothing is changed.  The undo leaves alone what somebody else has put there since.  Raises `AttributeError` or
    `KeyError` where there is no such attribute or item.
    """
    is_dict = isinstance(owner, dict)
    space = owner if is_dict else vars(owner)  # of a class a live view
    put = owner.__setitem__ if is_dict else functools.partial(setattr, owner)
    inherited = not is_dict and name not in space
    there = getattr(owner, name) if inherited else space[name]
    method = type(there) if isinstance(there, staticmethod | classmethod) else None
    stock = there.__func__ if method else there
    made = around(stock)
    if made is stock:
        return lambda: None
    if callable(stock) and not isinstance(stock, type):
        functools.update_wrapper(made, stock)
    ours = method(made) if method else made
    put(name, ours)

    def undo() -> None:
        if space.get(name) is not ours:
            return
        if inherited:
            delattr(owner, name)
        else:
            put(name, there)

    return undo
