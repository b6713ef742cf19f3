"""How fast gradkeel is: a question a file, all answered by the same stopwatch (`gradkeel.bench`).

make bench                                              # all of them; writes docs/benchmarks.md
.venv-peers/bin/python -m benchmarks.speed clip tiny    # some of them, printed
"""
