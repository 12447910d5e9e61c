"""Knows: pictures as files and arrays, and the record that a picture carries.
May import: errors, formats.
Must never know: what makes or trains on a picture.
"""
