"""Knows: LoRA training on MLX: the loop, the gradient, the optimizer, what is saved.
May import: all of zimage_mlx but tiny, all of zimage_ref but networks and tiny.
Must never know: that there is a command line.
"""
