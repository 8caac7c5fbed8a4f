"""The one thing setup.cfg cannot say: what is compiled (plain C, stable ABI).

The job kernel, and the scan of the prompt cache's vectors. Everything else is in setup.cfg.
Without a compiler the build goes on and the package falls back to plain Python, which is hundreds
of times slower for jobs and ten times for the scan, and says so when it is used;
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
        ),
        Extension(
            "intentd.proxy.cache._scan",
            sources=["proxy/cache/scan.c"],
            depends=["setup.py"],
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            py_limited_api=True,
            optional=os.environ.get("INTENTD_REQUIRE_KERNEL") != "1",
        ),
    ]
)
