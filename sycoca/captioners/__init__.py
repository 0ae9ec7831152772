"""Lightweight captioners on a frozen pair of encoders and a language model, and the parts they share."""
