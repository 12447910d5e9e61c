"""Knows: the built-in model's world: drawings, captions, the judge of its pictures; its files are in weights/.
May import: formats, model, pictures.
Must never know: the real model's files, and how either is trained.
"""
