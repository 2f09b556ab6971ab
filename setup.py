"""Metadata is in pyproject.toml; this maps kernels/ to ditfast.kernels and benchmarks/ to ditfast.benchmarks.

Hugging Face publishes a package named `kernels`, which diffusers and transformers import: ours is never a top-level module.
"""

import os
import sys

from setuptools import find_packages, setup

MOVED = {"ditfast.kernels": "kernels", "ditfast.benchmarks": "benchmarks"}
EDITABLE = ".editable"  # holds ditfast alone: the clone's root would make kernels, benchmarks and tests top-level modules


def link_folders() -> bool:
    """Link the folders to where their names say, for a path in site-packages: type checkers do not run import hooks."""
    os.makedirs(EDITABLE, exist_ok=True)
    links = {f"{EDITABLE}/ditfast": "../ditfast", **{f"ditfast/{folder}": f"../{folder}" for folder in MOVED.values()}}
    for link, target in links.items():
        if not os.path.lexists(link):
            try:
                os.symlink(target, link, target_is_directory=True)
            except OSError:  # Windows without the right to make links: setuptools' import hook does
                return False
    return True


editable = "editable_wheel" in sys.argv and link_folders()
packages = [*find_packages(include=["ditfast", "ditfast.*"], exclude=[f"{name}*" for name in MOVED]), *MOVED]

setup(
    packages=packages,
    package_dir={"": EDITABLE} if editable else {"ditfast": "ditfast", **MOVED},
    package_data={
        "ditfast": ["py.typed"],
        "ditfast.cpu": ["src/*"],
        "ditfast.data": ["*.safetensors"],
    },
    options={"egg_info": {"egg_base": "."}},  # not beside the linked ditfast
)
