"""Errors of planning that the user can put right."""

from kvfold.errors import KvfoldError


class ProfileError(KvfoldError):
    """A profile that cannot be read, written, or used for what is asked."""


class PlacementError(KvfoldError, ValueError):
    """A placement or a workload that cannot be simulated."""


class GoalError(KvfoldError, ValueError):
    """Latency limits that no placement meets at any rate."""
