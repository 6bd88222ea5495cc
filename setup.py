"""Builds the native kernel of the selective scan, where there is a C compiler; metadata is in setup.cfg."""

import sys

if sys.hexversion < 0x030B0000:
    sys.exit(f"This package needs Python 3.11 or newer; this is Python {sys.version.split()[0]}")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDER = "networks/selective_scan/"


class BuildScan(build_ext):
    """Uses OpenMP where the compiler has it."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            self.warn("the native selective scan needs gcc or clang; PyTorch's own operations are used instead")
            return
        optimise = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
        ext.extra_compile_args, ext.extra_link_args = [*optimise, "-fopenmp"], ["-fopenmp"]
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            self.warn("no OpenMP: building the native selective scan for one thread")
            ext.extra_compile_args, ext.extra_link_args = optimise, []
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "networks.selective_scan.scan_cpu",
            sources=[FOLDER + f"scan_cpu{part}.c" for part in ("", "_baseline", "_avx2", "_avx512")],
            depends=[FOLDER + f"scan_cpu{part}.h" for part in ("", "_vectors", "_task", "_forward", "_backward")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildScan},
)
