"""Knows: the three networks in NumPy, the oracle that MLX is compared with.
May import: formats, model, lora.
Must never know: files on disk, pictures, and the loop that calls the networks.
"""
