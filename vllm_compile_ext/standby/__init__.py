"""A process that has vLLM imported, of which `vllm serve` becomes a fork: by choice, ``vllm-compile-ext standby``.

    place   where a standby is asked
    facts   what is true of a process when it first imports vLLM: must be the same in both
    files   what imports have read of the file system: must be as it was
    client  `vllm serve`: asks, then stands for the server: passes its signals on, ends as it ends
    hold    the standby: imports, waits, forks
    keeper  a fork of it for each server: its parent, which tells the client how it ended
    server  what that fork does first: become as the client would have been

Environment and other surroundings are compared and given by `vllm_compile_ext.zygote.surroundings`, as for engines.
"""
