"""Knows: HTTP: who may ask, the interfaces that clients speak, and their errors.
May import: work, store, settings and refusals of zimage_serve; errors, formats and pictures of zimage_ref; FastAPI.
Must never know: how pictures are made, and which engine computes.
"""
