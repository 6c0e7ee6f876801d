"""The files in the loras folders: facts from each file's header, and its health.

metadata -> {facts, sidecars} -> health -> {cache, details} -> inspector
{inspector, companions, favourites} -> library

`library.AdapterLibrary` is the interface for programs. Headers are read in milliseconds a file and
tell what a file is; what other programs keep beside it is read with its details. The health of an
adapter needs its tensors and seconds, so it is judged in the background, one file at a time, in a
separate process, and cached on disk.
"""
