"""The base that is trained on: loaded, stored small, computed."""
