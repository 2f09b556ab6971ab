"""Metadata is in pyproject.toml; this maps the source folder kernels/ to the package ditfast.kernels.

Hugging Face publishes a package named `kernels`, which diffusers and transformers import: ours is never a top-level module.
"""

from setuptools import setup

setup(
    packages=["ditfast", "ditfast.ops", "ditfast.diffusion", "ditfast.data", "ditfast.kernels"],
    package_dir={"ditfast": "ditfast", "ditfast.kernels": "kernels"},
    package_data={"ditfast.data": ["*.safetensors"], "ditfast": ["py.typed"]},
)
