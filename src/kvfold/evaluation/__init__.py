"""Measures and reports of what a method costs and saves."""
