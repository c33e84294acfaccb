"""Processes of vLLM that are forked instead of spawned, from one that has everything imported: the zygote.

    reads         which variables were read while importing (from the process's first moment on)
    front         makes the zygote once vLLM's command has imported everything, where nothing speaks against forking
    zygote        that process: a fork of the front end, which forks itself for each process that is asked for
    context       what vLLM gets for `multiprocessing.get_context("spawn")`: asks the zygote, else spawns and says why
    child         what a fork does first
    surroundings  what a spawned process would inherit: taken from the process that asks, given to the fork
    threads       its OpenMP threads

A fork is as if it had been spawned: the process that asks is its parent, its arguments come pickled, and environment,
files, limits, signals and threads are those of a spawned process.  What cannot be made so is a reason to spawn.
"""

from __future__ import annotations


class NotForkedError(Exception):
    """A fork would not be as a spawned process is, or there is none; the message says why, and the caller spawns."""
