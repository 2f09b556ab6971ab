"""Metadata is in pyproject.toml; this maps kernels/ to ditfast.kernels and benchmarks/ to ditfast.benchmarks.

Hugging Face publishes a package named `kernels`, which diffusers and transformers import: ours is never a top-level module.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ditfast", "ditfast.*"]), "ditfast.kernels", "ditfast.benchmarks"],
    package_dir={"ditfast": "ditfast", "ditfast.kernels": "kernels", "ditfast.benchmarks": "benchmarks"},
    package_data={
        "ditfast": ["py.typed"],
        "ditfast.cpu": ["src/*"],
        "ditfast.data": ["*.safetensors"],
        "ditfast.prediction": ["*.json"],
    },
)
