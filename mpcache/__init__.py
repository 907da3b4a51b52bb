"""Run a language model once; keep its activations in a Zarr store (see README.md)."""

__version__ = "0.1.0"
