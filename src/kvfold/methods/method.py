"""What a method string comes to: a codec, a policy or both, made ready for a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from kvfold.errors import ConfigError
from kvfold.kv.format import raw_format
from kvfold.kv.layout import CacheLayout
from kvfold.kv.staged import StagedLayout
from kvfold.methods.base import CacheShape, Codec, Transform
from kvfold.methods.policy import Policy
from kvfold.methods.staging import Staging
from kvfold.methods.streaming import Streaming


@dataclass(frozen=True)
class ReadyMethod:
    """layout: of the cache; transform: of the weights (None: nothing); staging: what happens at events of a staged
    layout (None where the layout is not staged)."""

    layout: CacheLayout | StagedLayout
    transform: Transform | None = None
    staging: Staging | None = None


@dataclass(frozen=True)
class Method:
    """A codec and what decides which tokens it gets: a policy, a window, or nothing (all of them).

    Raises ConfigError for parts that cannot work together.
    """

    codec: Codec
    policy: Policy | None = None
    window: Streaming | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (self.policy is not None or not self.codec.positional):
            other = self.policy.name if self.policy is not None else self.codec.name
            raise ConfigError(
                f"streaming keeps tokens by their position alone and does not combine with {other}, which chooses "
                "when the prompt is read; join it with a codec such as zeroc or kivi"
            )

    @property
    def needs_calibration(self) -> bool:
        return self.codec.needs_calibration

    @property
    def staged(self) -> bool:
        """Whether tokens are dropped or coded at events, after the prompt or its context."""
        return self.policy is not None

    @property
    def compress(self) -> str:
        """When a staged method chooses: "prompt" or "context"."""
        return "prompt" if self.policy is None else self.policy.compress

    def query_agnostic(self) -> "Method":
        """The same method, choosing at the end of the context instead of the prompt's."""
        return self if self.policy is None else replace(self, policy=replace(self.policy, compress="context"))

    def prepare(self, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> ReadyMethod:
        """Lays out the cache. `statistics`: the artifact's tensors, for methods that need calibration."""
        if self.policy is not None:
            staging = self._staging(self.policy, shape, statistics)
            return ReadyMethod(staging.layout, staging=staging)
        prepared = self.codec.prepare(shape, statistics)
        layout = prepared.layout if self.window is None else self.window.narrowed(prepared.layout)
        return ReadyMethod(layout, prepared.transform)

    def _staging(self, policy: Policy, shape: CacheShape, statistics: Mapping[str, Tensor] | None) -> Staging:
        raw = raw_format(shape.page_bytes, shape.head_dim, shape.raw_bits)
        encoder = self.codec.stage(shape, statistics)
        layout = StagedLayout(
            raw,
            shape.windows,
            shape.kv_heads,
            budget=policy.tokens,
            least=policy.least,
            every=policy.every,
            chunk=policy.chunk,
            watches=policy.watches,
        )
        records = dict(policy.records(shape))
        if encoder is not None:
            layout = replace(
                layout,
                coded=encoder.formats,
                shares=encoder.shares,
                sinks=encoder.sinks,
                recent=encoder.recent,
                enough=encoder.enough,
                watches=tuple(dict.fromkeys((*policy.watches, *encoder.watches))),
            )
            records |= encoder.records
        return Staging(policy, encoder, layout, records)
