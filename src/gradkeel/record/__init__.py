"""Record: every step's gradient norms, coefficients and verdict, in one file on disk.

`Recorder` writes, `Reader` reads, also while training goes on; docs/record.md documents the file.
"""

from gradkeel.record.described import Parameter, Rollback, Session
from gradkeel.record.downsample import Buckets, bucket, bucket_norms
from gradkeel.record.export import export
from gradkeel.record.outbox import Sink
from gradkeel.record.reader import Reader
from gradkeel.record.recorder import Recorder
from gradkeel.record.rows import Rows

__all__ = [
    "Buckets",
    "Parameter",
    "Reader",
    "Recorder",
    "Rollback",
    "Rows",
    "Session",
    "Sink",
    "bucket",
    "bucket_norms",
    "export",
]
