"""A GPU on a machine without one: README.md says what it shows, and what it cannot."""
