"""A model with everything that a suite makes of it, each only when it is needed."""

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

from kvfold.config.engine import EngineConfig
from kvfold.config.progress import Progress
from kvfold.engine.engine import Engine
from kvfold.engine.lane import MethodLane
from kvfold.engine.llm import prepare_lane, resolve_dtypes
from kvfold.engine.sizing import held_bytes
from kvfold.errors import ConfigError
from kvfold.evaluation.catalogue import DENSE
from kvfold.evaluation.settings import SuiteSettings
from kvfold.model.fingerprint import fingerprint
from kvfold.model.loading import LoadedModel, load_model, load_spec, load_tokenizer
from kvfold.model.source import resolve_model

CONTEXTS = 4
"""Dense contexts that the memory holds: a sequence, what others may go on from, and room to compress."""
CHUNK = 512


class Bench:
    """Identity, tokenizer and limits of a model without its weights; sizes, lanes and engines with them."""

    def __init__(self, model: str | Path, settings: SuiteSettings, progress: Progress) -> None:
        # What budgets are shares of is a 16-bit cache, whatever the model computes in.
        self._compute, self._raw_bits = resolve_dtypes(settings.dtype, "bfloat16")
        self._settings = settings
        self._progress = progress
        self.path = resolve_model(model, progress)
        self.fingerprint = fingerprint(self.path)
        self.spec = load_spec(self.path)
        self.tokenizer = load_tokenizer(self.path)
        self.bytes_of = cache(self._bytes_of)

    @cached_property
    def model(self) -> LoadedModel:
        return load_model(self.path, dtype=self._compute, progress=self._progress)

    def dense_bytes(self, tokens: int) -> int:
        """Of a 16-bit cache."""
        return 2 * self.spec.kv_elements * tokens

    def _bytes_of(self, method: str, length: int) -> int:
        """Bytes held when a context of `length` tokens has just been compressed. Raises ConfigError where the method
        decides that by itself."""
        lane = self._lane(method)
        policy = lane.method.policy
        if policy is not None and policy.drops and policy.tokens is None:
            raise ConfigError(f"{policy.name} finds its size while it runs, so that no budget can be kept")
        return held_bytes(lane, length)

    def engine(self, methods: Sequence[str], longest: int) -> Engine:
        """An engine with the dense cache as lane 0 and then the methods; longest: tokens of a request, all counted."""
        lanes = [self._lane(method) for method in (DENSE, *methods)]
        memory = CONTEXTS * held_bytes(lanes[0], longest + CHUNK)
        config = EngineConfig(memory, chunk=CHUNK, max_batch_tokens=CHUNK, prefix_caching=True)
        return Engine(self.model.decoder, self.model.tokenizer, lanes, config)

    def _lane(self, method: str) -> MethodLane:
        return prepare_lane(self.model, method, self._raw_bits, self._settings.calibration, self._progress)[0]
