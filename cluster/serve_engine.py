"""The engine behind an endpoint: vLLM as Ray Serve LLM starts it, with all adapters in it."""

from __future__ import annotations

import os
from typing import Any

from cluster.served import BASE, Served
from configs.schema import Recipe

GIB = 1024**3
CPU_KV_CACHE_GIB = 1.0  # vLLM would take most of the machine's memory
MAX_SLOTS = 8  # adapters that answer in the same batch; further ones take turns
HEALTH_CHECK_S = 60.0  # a CPU that computes is slow to say that it is well
GRACE_S = 5.0  # that open answers have at the end


def llm_config(served: Served, recipe: Recipe, *, on_gpu: bool) -> Any:
    """Ray Serve LLM's description of the engine."""
    from ray.serve.llm import LLMConfig

    width = recipe.generator.tensor_parallel if on_gpu else 1
    bundle = {"CPU": recipe.cluster.cpus_per_worker} | ({"GPU": 1} if on_gpu else {})
    return LLMConfig(
        model_loading_config={"model_id": BASE, "model_source": str(served.base)},
        engine_kwargs=engine_settings(served, recipe, on_gpu=on_gpu),
        accelerator_type=None,
        placement_group_config={"bundles": [bundle] * width},
        runtime_env={"env_vars": environment(recipe, on_gpu=on_gpu)},
        deployment_config={
            "num_replicas": 1,
            "max_constructor_retry_count": 1,  # what fails once fails again, and would be silent for minutes
            "health_check_timeout_s": HEALTH_CHECK_S,
            "graceful_shutdown_timeout_s": GRACE_S,
            "graceful_shutdown_wait_loop_s": 1.0,
            "ray_actor_options": {"num_cpus": recipe.cluster.cpus_per_worker},
        },
        callback_config={"callback_class": "cluster.local_model.LocalModel"},  # pyright: ignore[reportArgumentType]
        log_engine_metrics=False,
    )


def engine_settings(served: Served, recipe: Recipe, *, on_gpu: bool) -> dict[str, Any]:
    """vLLM's arguments: those of the run's generator, but a GPU is the endpoint's alone."""
    config = recipe.generator
    kv_cache_gib = config.kv_cache_gib or (None if on_gpu else CPU_KV_CACHE_GIB)
    settings: dict[str, Any] = {
        "dtype": config.dtype or recipe.model.dtype,
        "max_model_len": -1,  # the model's own context, or as much of it as the KV cache can hold
        "block_size": config.block_tokens,
        "max_num_seqs": config.max_running,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * GIB),
        "enable_prefix_caching": True,
        "enforce_eager": config.enforce_eager or not on_gpu,
        "tensor_parallel_size": config.tensor_parallel if on_gpu else 1,
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    if not on_gpu:
        # A prompt that is cut over two steps makes vLLM rewind its random generator, which those of CPUs cannot.
        settings |= {"distributed_executor_backend": "mp", "enable_chunked_prefill": False}
    if served.adapters:
        settings |= {
            "enable_lora": True,
            "max_loras": min(len(served.adapters), MAX_SLOTS),
            "max_cpu_loras": len(served.adapters),
            "max_lora_rank": served.rank,
            "lora_target_modules": list(served.targets),
            "lora_modules": [{"name": name, "path": str(path)} for name, path in served.adapters.items()],
        }
    return settings


def environment(recipe: Recipe, *, on_gpu: bool) -> dict[str, str]:
    """What the engine's processes find in their environment."""
    always = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if on_gpu:
        return always
    threads = recipe.cluster.threads or len(os.sched_getaffinity(0))
    # Compiling the sampler takes longer than it saves. Bound to cores, vLLM would leave one of them idle.
    return always | {
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
