def factors(config, model):
    from vllm.compilation.caching import aot_compile_hash_factors
    from vllm.compilation.decorators import _model_hash_key

    return {
        "class": type(model).__qualname__,
        "config": str([*aot_compile_hash_factors(config), _model_hash_key(model.forward)]),
    }
