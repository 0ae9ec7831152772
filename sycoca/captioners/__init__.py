"""Lightweight captioners on top of a frozen pair of encoders and any transformers language model."""
