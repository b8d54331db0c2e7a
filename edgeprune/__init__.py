"""Fit a Mixture-of-Experts language model to a device, as a GGUF for stock llama.cpp, with proof."""

__version__ = "0.1.0"
