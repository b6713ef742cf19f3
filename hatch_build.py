"""Builds the optional native kernels into the wheel where there is a C compiler; without one it is pure Python."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).parent / "src" / "gradkeel" / "kernels"
SOURCE, LIBRARY = FOLDER / "native.c", FOLDER / "_native.so"

# For every processor of its kind: the code chooses among its levels when it runs. Sums may be reordered and zeros lose
# their sign, which lets the compiler use vectors; NaN and inf keep their meaning.
FLAGS = (
    "-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden",
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
)  # fmt: skip


class NativeKernels(BuildHookInterface[Any]):
    """Adds the library to the wheel, which is then for one platform, but for every Python 3 and torch."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, beside the sources for an editable wheel; hatchling calls this before it makes a wheel."""
        if self.target_name != "wheel":
            return
        self._temporary = tempfile.TemporaryDirectory()
        library = LIBRARY if version == "editable" else Path(self._temporary.name) / LIBRARY.name
        failure = build(library)
        if failure is not None:
            self.app.display_warning(
                f"gradkeel: no native kernels ({failure}); torch's operations will do their work"
            )
            return
        if version != "editable":
            build_data["force_include"][str(library)] = "gradkeel/kernels/_native.so"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Clean up."""
        if self.target_name == "wheel":
            self._temporary.cleanup()


def build(library: Path) -> str | None:
    """Compile the library; returns why that was not possible, or None."""
    if os.environ.get("GRADKEEL_NATIVE", "").lower() == "off":
        return "turned off by GRADKEEL_NATIVE"
    if sys.platform != "linux":
        return "they are for Linux"
    compiler = shlex.split(os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), ""))
    if not compiler:
        return "no C compiler"
    # Not written in place: a process may have the old one loaded.
    fresh = library.with_suffix(f".{os.getpid()}")
    try:
        subprocess.run(
            [*compiler, *FLAGS, "-o", fresh, SOURCE, "-lm"], check=True, capture_output=True, text=True
        )
        ctypes.CDLL(str(fresh)).gradkeel_levels()
        fresh.replace(library)
    except (OSError, AttributeError, subprocess.CalledProcessError) as error:
        library.unlink(missing_ok=True)
        return f"{compiler[0]}: {getattr(error, 'stderr', '') or error}"
    finally:
        fresh.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    sys.exit(build(LIBRARY))
