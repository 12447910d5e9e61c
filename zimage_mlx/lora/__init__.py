"""Knows: LoRA layers of a network on MLX, and adapters that put them in place.
May import: networks, and formats and lora of zimage_ref.
Must never know: files on disk, and how a LoRA is trained.
"""
