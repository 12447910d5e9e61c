"""Knows: how the built-in model is trained from scratch.
May import: all of zimage_mlx except lora and training, and zimage_ref except networks.
Must never know: how a LoRA is trained.
"""
