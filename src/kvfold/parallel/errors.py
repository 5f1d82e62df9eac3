"""What can go wrong between ranks through the user's input or a machine that is lost."""

from kvfold.errors import KvfoldError


class ParallelError(KvfoldError, RuntimeError):
    """Ranks that do not fit together, a rank that is lost, or a method that cannot be spread over ranks."""
