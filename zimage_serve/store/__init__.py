"""Knows: what the server keeps: a database of jobs, pictures and runs, and the folders beside it with their files.
May import: errors, formats, pictures of zimage_ref.
Must never know: HTTP, and how pictures are made.
"""
