"""Knows: the work of the server: orders, jobs, the queue, the one thread that owns the model, training runs.
May import: store, settings and refusals of zimage_serve, and zimage_ref except networks and tiny.
Must never know: HTTP, and which engine computes.
"""
