"""Experiments behind the documentation; not part of the package."""
