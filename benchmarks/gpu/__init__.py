"""What clipping costs on a GPU: wall time, the host's and the device's told apart, of every policy beside torch's clip.

Measured where a GPU is, and written into docs/benchmarks.md anywhere::

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --write gpu.json
"""
