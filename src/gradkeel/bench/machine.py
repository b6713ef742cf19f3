"""This module says in words on what something was measured."""

import platform
from pathlib import Path

import torch

from gradkeel.doctor import accelerator_route, cpu_route
from gradkeel.language import count, say


def machine(device: torch.device) -> str:
    """Name processor, threads, versions, and which code measures the gradients there."""
    route = (accelerator_route() if device.type != "cpu" else None) or cpu_route()
    name = route.name or processor()
    path = {
        "native": say("native kernels ({level})", level=route.level), "torch": say("torch's operations")
    }.get(route.path, route.path)  # fmt: skip
    return say(
        "{name}{threads}, gradkeel's {path}, Python {python}, torch {torch}",
        name=name,
        threads=count(route.threads, ", {n} thread", ", {n} threads") if route.threads else "",
        path=path,
        python=platform.python_version(),
        torch=torch.__version__,
    )


def processor() -> str:
    """Return the processor's name, as far as it tells."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
