"""What can go wrong in an evaluation through the user's input, data or folder."""

from kvfold.errors import KvfoldError


class EvaluationError(KvfoldError, ValueError):
    """Data that is missing, a folder of other settings, families or figures that do not match."""
