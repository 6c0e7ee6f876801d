"""HTTP, and the jobs that a running server watches over."""
