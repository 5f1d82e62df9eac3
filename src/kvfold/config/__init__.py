"""Typed configuration: the method grammar, sizes in bytes, the progress protocol. Imports no other room."""
