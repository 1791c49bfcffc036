"""Tasks: what a model reads, what it is asked, and how the answers become rows."""
