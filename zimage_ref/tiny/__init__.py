"""Knows: the built-in model's world: drawings, captions, the judge of its pictures; its files are in weights/.
May import: formats, model, pictures, checkpoints.
Must never know: the real model's weights, and how either is trained.
"""
