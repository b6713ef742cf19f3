"""Mutation test of the core: small faults are planted one at a time, and the tests must notice them.

`python -m benchmarks.mutants` draws a sample, runs for each mutant the tests that touch its line, and says which
mutants no test has noticed. mutmut finds the mutations, coverage.py says which test touches what.
"""
