"""The one thing setup.cfg cannot say: the compiled job kernel (plain C, stable ABI).

Everything else is in setup.cfg. Without a compiler the build goes on and the package falls back
to the plain-Python reference, which is hundreds of times slower and says so when it is used;
INTENTD_REQUIRE_KERNEL=1 makes the missing compiler an error instead.
"""

import os

from setuptools import Extension, setup

SOURCES = [f"core/jobs/kernel/{name}.c" for name in ("allocate", "engine", "module")]

setup(
    ext_modules=[
        Extension(
            "intentd.core.jobs._kernel",
            sources=SOURCES,
            depends=["core/jobs/kernel/kernel.h", "core/jobs/kernel/engine.h", "setup.py"],
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
            py_limited_api=True,
            optional=os.environ.get("INTENTD_REQUIRE_KERNEL") != "1",
        )
    ]
)
