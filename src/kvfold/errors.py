"""Every error a user can cause, typed. Each message is one sentence that ends with the remedy.

The command line turns any `KvfoldError` into that sentence on stderr and exit code 2.
"""


class KvfoldError(Exception):
    """Base of all errors that kvfold raises on purpose; anything else is a defect of kvfold."""


class ConfigError(KvfoldError, ValueError):
    """An option, a size or a method string that cannot be understood or is out of range."""


class ModelError(KvfoldError):
    """A model that cannot be found, read or run: unknown name, missing shard, unsupported family."""


class CalibrationError(KvfoldError):
    """Calibration text that is too short, or an artifact that is corrupt or made for something else."""


class PromptError(KvfoldError, ValueError):
    """A prompt that cannot be served: empty, longer than the model's positions, or unreadable."""


class MemoryLimitError(KvfoldError, MemoryError):
    """A request that could never fit the configured KV memory, or a pool that cannot be allocated."""


class EngineDiedError(KvfoldError):
    """The engine process ended while it was needed; the server says whether it starts again."""


class EngineNotReadyError(KvfoldError):
    """The engine process is starting, or has failed for good: nothing can be asked of it now."""


class KernelsUnavailable(KvfoldError):
    """The compiled kernels are not there or not for this machine."""


class GrammarError(KvfoldError, ValueError):
    """A JSON schema or tool that output cannot be constrained to: invalid, unsupported, impossible or too large."""


class TransferError(KvfoldError):
    """A KV cache that did not arrive: corrupt, stalled, cut off, or made by another model, calibration or version."""


class ClusterError(KvfoldError):
    """Workers that cannot be started or joined: no Ray, no such address, too few resources, mixed versions."""
