"""What lies in the loras folders: facts from each file's header, and its health.

metadata -> facts -> health -> {cache, details} -> inspector -> library

`library.AdapterLibrary` is what a program talks to. Headers are read in milliseconds a file and
answer what a file is; the health of an adapter takes its tensors and seconds, so it is judged in
the background, one file at a time, by a process of its own, and kept on disk.
"""
