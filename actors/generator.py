"""The generator: ten answers per prompt from an in-process vLLM engine, with the policy's adapter provably loaded."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
import torch._dynamo

from actors.adapters import changes_nothing, check_adapter, engine_checksum, expected_shapes, target_names
from configs.schema import Dtype, GeneratorConfig, LoraConfig
from rlhf.chat import ChatTokenizer
from rlhf.device_memory import give_back
from rlhf.errors import DataError, RecipeError, SyncError
from rlhf.records import Adapter, Answer, AnswerGroup, Prompt, Sampling

GIB = 1024**3
CPU_KV_CACHE_GIB = 1.0  # vLLM would take most of the machine's memory


class Generator:
    """Writes answers, through vLLM, in this process.

    One request per prompt, with n answers that share the prompt's KV cache. Token ids go in and come out; nothing is
    tokenised again. Version 0 is the base as it is, until an adapter is loaded.

    Raises ModelError for a base that cannot be used, RecipeError for a context or a rank beyond the engine's limits.
    """

    def __init__(
        self,
        model_path: str,
        config: GeneratorConfig,
        lora: LoraConfig,
        *,
        dtype: Dtype,
        max_model_tokens: int,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        self._chat = ChatTokenizer(model_path)
        self._context = max_model_tokens
        _check_context(max_model_tokens, self._chat.context_tokens)
        self._lora = lora
        self._shapes = expected_shapes(model_path, lora)
        self._dtype: torch.dtype = getattr(torch, config.dtype or dtype)
        self._on_gpu = torch.cuda.is_available()
        self._owns_process_group = not torch.distributed.is_initialized()
        self._version: int | None = 0
        self._request: Any = None  # vLLM's LoRARequest; None: the base
        self._loads = 0
        with _vllm_environment(threads, on_gpu=self._on_gpu):
            from vllm import LLM

            self._llm: Any = LLM(
                model=model_path,
                dtype=config.dtype or dtype,
                max_model_len=max_model_tokens,
                seed=seed,
                **engine_settings(config, lora, target_names(self._shapes), on_gpu=self._on_gpu),
            )
        if not self._on_gpu:
            self._llm.collective_rpc("use_plain_matmuls")

    @property
    def version(self) -> int | None:
        """Of the adapter that writes answers now; None after a sync that failed."""
        return self._version

    def load_adapter(self, adapter: Adapter) -> dict[str, float]:
        """Sync metrics (seconds, MiB), once the engine is proved to hold this adapter. Empties the prefix cache.

        The proof is a checksum that each worker makes of the tensors in its own slot. An adapter that changes nothing
        (version 0, every B zero) is the base, and no adapter is loaded for it.

        Raises SyncError for an adapter that does not fit the base, was altered, or did not get into the engine.
        """
        started = time.perf_counter()
        self._version, self._request = None, None
        check_adapter(adapter, self._shapes, self._lora)
        # Cached keys and values were made by the adapter before; and a replayed step starts with a cold cache as well.
        self.reset_prefix_cache()
        self._loads += 1
        checked = time.perf_counter()
        if adapter.version == 0 and changes_nothing(adapter):
            held = self._llm.collective_rpc("drop_adapters")
            if any(num != 0 for num in held):
                raise SyncError(f"The engine still holds an adapter after all were dropped ({held}).", remedy=_RESUME)
        else:
            self._hold(adapter)
        self._version = adapter.version
        size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
        return {
            "time/sync_check": checked - started,
            "time/sync_load": time.perf_counter() - checked,
            "sync/adapter_mib": size / 1024**2,
        }

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[AnswerGroup]:
        """One group of `sampling.n` answers per prompt, in order. All requests are in the engine at the same time.

        Logprobs are log_softmax(logits / temperature) of the sampled tokens (at temperature 0, which is greedy and
        needs n = 1, of the plain logits). Answer i of a request is drawn with its seed + i.

        Raises DataError for a prompt that leaves no room for an answer, SyncError after a sync that failed.
        """
        assert len(prompts) == len(seeds), (len(prompts), len(seeds))
        assert sampling.temperature > 0 or sampling.n == 1, f"{sampling.n} greedy answers would be one and the same"
        version = self._version
        if version is None:
            raise SyncError("The generator has no adapter: the last sync failed.", remedy=_RESUME)
        for prompt in prompts:
            self._check_length(prompt, sampling)
        self.reset_prefix_cache()  # so that a batch that is asked for again after a resume meets what it met before
        outputs = self._generate(
            [prompt.token_ids for prompt in prompts],
            [self._sampling_params(sampling, seed) for seed in seeds],
            self._request,
        )
        groups = [
            AnswerGroup(prompt, tuple(self._answer(completion, version) for completion in output.outputs))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        assert all(len(group.answers) == sampling.n for group in groups)
        return groups

    def canary_logprobs(self, token_ids: Sequence[int]) -> tuple[list[float], list[float]]:
        """Nats at temperature 1 of each token after the first, [len(token_ids) - 1]: with the adapter, and without."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._generate([token_ids] * 2, [params] * 2, [self._request, None])
        with_adapter, without = (
            [by_token[token].logprob for token, by_token in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)]
            for output in outputs
        )
        return with_adapter, without

    def reset_prefix_cache(self) -> None:
        """Forgets the keys and values of earlier prompts."""
        done = self._llm.reset_prefix_cache()
        assert done, "answers were still being written"

    def sleep(self) -> None:
        """Gives the GPU's memory to the trainer. Does nothing on a CPU."""
        if self._on_gpu:
            self._llm.sleep(level=1)
            give_back("cuda")

    def wake(self) -> None:
        """Takes the GPU's memory back. Does nothing on a CPU."""
        if self._on_gpu:
            self._llm.wake_up()

    def shutdown(self) -> None:
        """Ends the engine and gives its memory back; the generator can't be used any more."""
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        if self._owns_process_group:
            destroy_model_parallel()
            destroy_distributed_environment()
        gc.collect()

    def _hold(self, adapter: Adapter) -> None:
        from vllm.lora.request import LoRARequest

        lora_id = self._loads
        self._llm.collective_rpc("hold_adapter", args=(lora_id, dict(adapter.tensors), dict(adapter.config)))
        expected = engine_checksum(adapter, self._dtype)
        held = self._llm.collective_rpc("held_checksum", args=(lora_id,))
        if not held or any(found != expected for found in held):
            shown = ", ".join(str(found)[:12] or "no such adapter" for found in held) or "no answer"
            raise SyncError(
                f"The adapter of version {adapter.version} did not reach the engine, which holds: {shown}.",
                limit=f"It must hold {expected[:12]}.",
                remedy=_RESUME,
            )
        # The prefix cache is keyed by name and path. The path is never read: the adapter is registered by its id.
        self._request = LoRARequest(f"policy-v{adapter.version}", lora_id, f"memory:{adapter.checksum}")

    def _generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Any], request: Any) -> list[Any]:
        tokens = [{"prompt_token_ids": list(token_ids)} for token_ids in prompts]
        return self._llm.generate(tokens, list(params), use_tqdm=False, lora_request=request)

    def _sampling_params(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.n,
            seed=seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_answer_tokens,
            stop_token_ids=sorted(self._chat.eos_ids),
            logprobs=0,
            detokenize=False,
        )

    def _answer(self, completion: Any, version: int) -> Answer:
        token_ids, ended = cut(completion.token_ids, self._chat.eos_ids)
        logprobs = tuple(
            by_token[token].logprob for token, by_token in zip(token_ids, completion.logprobs, strict=False)
        )
        return Answer(token_ids, logprobs, "eos" if ended else "length", version, self._chat.decode(token_ids))

    def _check_length(self, prompt: Prompt, sampling: Sampling) -> None:
        room = self._context - sampling.max_answer_tokens
        if len(prompt.token_ids) > room:
            raise DataError(
                f"The prompt {prompt.id} ({prompt.text[:40]!r}) has {len(prompt.token_ids)} tokens.",
                limit=f"A context of {self._context} with sampling.max_answer_tokens={sampling.max_answer_tokens} "
                f"leaves {room}.",
                remedy="Shorten or drop the prompt, or lower sampling.max_answer_tokens.",
            )


def cut(token_ids: Sequence[int], eos_ids: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens up to the first end token, which is included, and whether there was one."""
    for index, token in enumerate(token_ids):
        if token in eos_ids:
            return tuple(token_ids[: index + 1]), True
    return tuple(token_ids), False


_RESUME = "Resume the run: the adapter is sent again. If it comes back, report it: answers would be stale."


def engine_settings(config: GeneratorConfig, lora: LoraConfig, targets: list[str], *, on_gpu: bool) -> dict[str, Any]:
    """vLLM's arguments. One slot: the policy's newest adapter is the only one that answers."""
    kv_cache_gib = config.kv_cache_gib or (None if on_gpu else CPU_KV_CACHE_GIB)
    settings: dict[str, Any] = {
        "block_size": config.block_tokens,
        "max_num_seqs": config.max_running,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * GIB),
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 2,
        "max_lora_rank": _engine_rank(lora.rank),
        # Without it every layer gets a slot, the output layer too, and pays for it at every token.
        "lora_target_modules": targets,
        "worker_extension_cls": "actors.lora_worker.LoraWorker",
        "use_tqdm_on_load": False,
        "tensor_parallel_size": config.tensor_parallel,
        "enforce_eager": config.enforce_eager or not on_gpu,
    }
    if not on_gpu:
        # A prompt that is cut over two steps makes vLLM rewind its random generator, which those of CPUs cannot.
        settings |= {"enable_chunked_prefill": False}
    if on_gpu:
        settings |= {"gpu_memory_utilization": config.gpu_memory_share, "enable_sleep_mode": True}
    return settings


def _engine_rank(rank: int) -> int:
    """The smallest rank that vLLM has kernels for and that holds this one."""
    from vllm.config.lora import MaxLoRARanks

    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise RecipeError(f"lora.rank={rank}.", limit=f"vLLM holds ranks up to {max(ranks)}.", remedy="Lower it.")
    return min(size for size in ranks if size >= rank)


def _check_context(max_model_tokens: int, limit: int | None) -> None:
    if limit is not None and max_model_tokens > limit:
        raise RecipeError(
            f"The longest prompt and the longest answer make {max_model_tokens} tokens.",
            limit=f"The base's context has {limit}.",
            remedy="Lower data.max_prompt_tokens or sampling.max_answer_tokens.",
        )


@contextmanager
def _vllm_environment(threads: int | None, *, on_gpu: bool) -> Iterator[None]:
    """The environment that vLLM reads when it is imported and started; undoes what it does to its process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    preload, set_num_threads = os.environ.get("LD_PRELOAD"), torch.set_num_threads
    if not on_gpu:
        # Compiling the sampler takes longer than it saves. Torch has read the environment already, vLLM reads it now.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        torch._dynamo.config.disable = True
        threads = threads or len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else vLLM goes down to one thread
        torch.set_num_threads(threads)  # OpenMP has read the environment long ago
    try:
        yield
    finally:
        # vLLM preloads its allocator into every later child process, and makes set_num_threads do nothing.
        torch.set_num_threads = set_num_threads
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload
