"""The offline face of the engine, in the conventions of vLLM."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvfold.attention.base import AttentionBackend
from kvfold.attention.choose import choose_backend
from kvfold.calibration.run import find_artifact
from kvfold.config.engine import EngineConfig
from kvfold.config.method import choose_method, list_methods
from kvfold.config.progress import SILENT, Progress
from kvfold.config.size import parse_bytes
from kvfold.engine.engine import Engine
from kvfold.engine.lane import MethodLane, build_lane, pack_lanes
from kvfold.engine.outputs import RequestOutput
from kvfold.engine.params import SamplingParams
from kvfold.engine.prompts import (
    Messages,
    Prompt,
    Tokens,
    encode,
    last_message,
    list_conversations,
    list_prompts,
    render_chat,
    tokenize,
)
from kvfold.engine.search import Trial, search_bits
from kvfold.errors import ConfigError, ModelError, PromptError
from kvfold.methods.registry import build_method
from kvfold.methods.zeroc import ZeroC
from kvfold.model.loading import LoadedModel, load_model
from kvfold.model.packed import weight_bits
from kvfold.native.memory import return_freed_memory


class LLM:
    """A model with its KV cache, ready to generate.

    model: alias, directory, hub id or GGUF file. kv: the method, such as "none" or "zeroc(bits=4)", or several to
    choose from per call, the first being the default; methods that need a calibration find the model's own in the
    user's cache (made on first use), or take `calibration`.
    kv_memory: bytes or a size such as "1GiB". dtype: of weights and activations; "auto" is bfloat16 where the
    processor computes in it and float32 elsewhere. weights: "auto" keeps them in dtype; "bfloat16", "int8" and "int4"
    pack them for the compiled kernels, which read fewer bytes. kv_dtype: of uncompressed keys and values; "auto" is
    float32 where dtype="float32" is asked for and bfloat16 otherwise. chunk: prompt tokens of one request per step.
    backend: who computes attention: "auto", "cpu", "reference" (see `choose_backend`) or an object.
    `curve` holds what a search for `max_loss` measured.

    Raises ConfigError, ModelError, CalibrationError or MemoryLimitError before any token is computed.
    """

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        kv: str | Sequence[str] = "none",
        kv_memory: int | str = "1GiB",
        dtype: str = "auto",
        weights: str = "auto",
        kv_dtype: str = "auto",
        seed: int = 0,
        calibration: Path | str | None = None,
        chunk: int = 512,
        max_batch_tokens: int = 2048,
        max_sequences: int = 256,
        prefix_caching: bool = True,
        threads: int | None = None,
        backend: AttentionBackend | str | None = None,
        progress: Progress = SILENT,
    ) -> None:
        config = EngineConfig(
            parse_bytes(kv_memory), chunk, max_batch_tokens, max_sequences, prefix_caching=prefix_caching, seed=seed
        )
        bits = weight_bits(weights)
        methods = list_methods(kv)
        for method in methods:
            build_method(method)  # a misspelt method fails before the model is loaded
        if threads is not None:
            if not isinstance(threads, int) or threads < 1:
                raise ConfigError(f"threads={threads!r} is out of range; give a positive integer")
            torch.set_num_threads(threads)
        attention = choose_backend(backend) if backend is None or isinstance(backend, str) else backend
        compute, raw_bits = resolve_dtypes(dtype, kv_dtype)
        self.model = load_model(model, dtype=compute, progress=progress)
        path = None if calibration is None else Path(calibration)
        prepared = [prepare_lane(self.model, method, raw_bits, path, progress) for method in methods]
        self.methods = methods
        self.curve = [trial for _, curve in prepared for trial in curve]
        lanes = pack_lanes(self.model.decoder, [lane for lane, _ in prepared], bits)
        del prepared
        return_freed_memory()
        self.engine = Engine(self.model.decoder, self.model.tokenizer, lanes, config, attention)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv: str | None = None,
        progress: Progress = SILENT,
    ) -> list[RequestOutput]:
        """Completes prompts as one batch, in order, with the method `kv` of this model's (None: the first).

        prompts: texts, lists of token ids, {"prompt": text} or {"prompt_token_ids": ids}; with a context that is
        to be compressed before the rest is read, {"context": text, "prompt": text} or "context_tokens" beside ids.
        params: one for all prompts or one for each. A prompt that cannot be served raises before any work.
        Interrupted (KeyboardInterrupt), it cancels all requests and frees their pages.
        """
        listed = list_prompts(prompts)
        each = [params or SamplingParams()] * len(listed) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(listed):
            raise PromptError(
                f"{len(each)} sampling parameters for {len(listed)} prompts; give one for each or one for all"
            )
        for own in each:
            if not isinstance(own, SamplingParams):
                raise ConfigError(f"params={own!r} is not allowed; give SamplingParams(...), one or a list of them")
        return self._run(
            [tokenize(self.model.tokenizer, p) for p in listed], each, choose_method(self.methods, kv), progress
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv: str | None = None,
        progress: Progress = SILENT,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several, rendered with the model's chat template; `kv` as in `generate`.

        A method with compress="context" compresses what comes before the last message.
        """
        tokenizer = self.model.tokenizer
        marks = self.engine.lanes[choose_method(self.methods, kv)].method.compress == "context"
        prompts: list[Prompt] = []
        for conversation in list_conversations(messages):
            ids = encode(tokenizer, render_chat(tokenizer, conversation), add_special_tokens=False)
            mark = {"context_tokens": last_message(tokenizer, conversation, ids)} if marks else {}
            prompts.append({"prompt_token_ids": ids, **mark})
        return self.generate(prompts, params, kv=kv, progress=progress)

    def _run(
        self,
        prompts: list[Tokens],
        params: list[SamplingParams],
        lane: int,
        progress: Progress,
    ) -> list[RequestOutput]:
        engine = self.engine
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, each in zip(prompts, params, strict=True):
                ids.append(engine.add_request(prompt.ids, each, prompt=prompt.text, lane=lane, context=prompt.context))
            work = sum(len(prompt.ids) for prompt in prompts)
            with progress.task("generating", work + sum((p.max_tokens or 0) * p.n for p in params)) as advance:
                before = 0
                while engine.has_unfinished:
                    for output in engine.step():
                        failed = next((c for c in output.outputs if c.finish_reason == "error"), None)
                        if failed is not None:
                            raise ModelError(str(failed.stop_reason))
                        if output.finished:
                            done[output.request_id] = output
                    after = engine.prompt_tokens + engine.generated_tokens
                    advance(after - before)
                    before = after
        finally:
            for request_id in ids:
                engine.abort(request_id)
        engine.check_integrity()
        return [done[request_id] for request_id in ids]


def resolve_dtypes(dtype: str, kv_dtype: str) -> tuple[torch.dtype, int]:
    """The dtype to compute in, and the bits of an uncompressed element of the cache."""
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    for name, value in (("dtype", dtype), ("kv_dtype", kv_dtype)):
        if value not in ("auto", *known):
            raise ConfigError(f"{name}={value!r} is unknown; choose auto, bfloat16 or float32")
    native = torch.cpu.get_capabilities()
    fast = native.get("avx512_bf16") or native.get("amx_bf16") or native.get("bf16")
    compute = known.get(dtype, torch.bfloat16 if fast else torch.float32)
    stored = known.get(kv_dtype, torch.float32 if dtype == "float32" else torch.bfloat16)
    return compute, torch.finfo(stored).bits


def prepare_lane(
    model: LoadedModel, kv: str, raw_bits: int, calibration: Path | None = None, progress: Progress = SILENT
) -> tuple[MethodLane, list[Trial]]:
    """Builds the lane of a method string; calibrates or searches first where the method asks for it."""
    method = build_method(kv)
    if not method.needs_calibration:
        return replace(build_lane(model.decoder, kv, method, raw_bits), model=model.fingerprint), []
    path, artifact = find_artifact(model, calibration, progress)
    curve: list[Trial] = []
    if isinstance(method.codec, ZeroC) and method.codec.max_loss is not None:
        codec, curve = search_bits(model, method.codec, artifact, path, raw_bits, progress)
        method = replace(method, codec=codec)
    lane = build_lane(model.decoder, kv, method, raw_bits, artifact.tensors)
    return replace(lane, model=model.fingerprint, calibration=artifact.checksum), curve
