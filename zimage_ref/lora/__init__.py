"""Knows: LoRAs: kinds of updates and their arithmetic, keys and spellings, files, merging.
May import: errors, formats, model.
Must never know: how a network applies an update, or how one is trained.
"""
