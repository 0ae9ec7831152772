"""Checkpoints: written whole or not at all, loaded, kept in a second home, made into one file of weights."""
