"""Spec strings: from words to policies, and from policies to words."""
