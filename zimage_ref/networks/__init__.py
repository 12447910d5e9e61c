"""Knows: the three networks in NumPy, the reference that tests compare MLX with.
May import: formats, model, lora.
Must never know: files on disk, pictures, and the loop that calls the networks.
"""
