"""A shrunken Qwen-Image-Edit with random weights, and a real ComfyUI server to run it on.

For `dev.py demo` and the tests; never shipped.
"""
