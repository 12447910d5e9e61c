"""Knows: how the built-in model is made from nothing.
May import: all of zimage_mlx but lora and training, and zimage_ref but networks.
Must never know: how a LoRA is trained.
"""
