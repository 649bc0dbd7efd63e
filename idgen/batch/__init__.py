"""Batch rendering: a prompt file in, a finished folder out."""
