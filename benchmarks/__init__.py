"""The benchmarks, installed as ``ditfast.benchmarks``; ``bench.py`` is the main job."""
