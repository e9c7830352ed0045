"""Activations on disk. Without this room, streaming still works."""
