"""Pairs of images on disk or from a graph: found, checked, and cached as a training set.

images -> pair -> {layouts, metadata_files} -> {facts, swapping, preflight} -> {preview, cache}
"""
