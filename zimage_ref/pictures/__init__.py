"""Knows: pictures as files and arrays, and the record inside a picture file.
May import: errors, extras, formats.
Must never know: which code makes a picture, or trains on it.
"""
