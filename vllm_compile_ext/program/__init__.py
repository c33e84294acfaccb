"""A compiled model as data, and the store that it is kept in.

program: an entry of the store and back.  piece: one compiled piece as bytes.  dump: Dynamo's bytecode for people.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from pathlib import Path
from typing import Any

from vllm_compile_ext import platforms, settings
from vllm_compile_ext.store.store import Manifest, Store, UnsafeStoreError

logger = logging.getLogger(__name__)


class NotKept(Exception):  # noqa: N818 - an answer, not an error
    """Something of a compiled model has no bytes that mean the same in another process; the message says what."""


def open_store() -> Store | None:
    """The store of this process; None, after one line that says why, where there is none to be used."""
    return _open(settings.store())


@functools.cache
def _open(folder: Path) -> Store | None:
    if sys.flags.optimize:  # torch 2.13.0: a pass has its effect inside of an assert, and drops a store then
        logger.warning("nothing is loaded or kept: under python -O (PYTHONOPTIMIZE) torch may compile wrong code")
        return None
    try:
        return Store.open(folder, settings.store_limit())
    except UnsafeStoreError as error:
        logger.warning("every start compiles, nothing is read or kept: %s", error)
    except OSError as error:
        logger.warning("every start compiles: the store %s cannot be opened (%s)", folder, error)
    return None


def commit(store: Store, **about: Any) -> None:
    """Write an entry that this machine has made now.  about: the other fields of `Manifest`.  Raises `OSError`."""
    store.commit(Manifest(created=time.time(), platform=platforms.name(), **about))
