"""Knows: the built-in model: its drawings and captions, the judge of its pictures, its files (weights/).
May import: formats, model, pictures, checkpoints.
Must never know: the weights of the real model, and how either model is trained.
"""
