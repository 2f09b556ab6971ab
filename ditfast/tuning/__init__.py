"""Measuring which implementation of an op is fastest on a device, and remembering it."""
