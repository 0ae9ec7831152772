"""Measures of a subject: retrieval, zero-shot classification, caption metrics, question answering."""
