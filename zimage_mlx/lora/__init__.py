"""Knows: LoRA layers for networks on MLX, and adapters that put them into a model.
May import: networks, and formats, model and lora of zimage_ref.
Must never know: files on disk, and how a LoRA is trained.
"""
