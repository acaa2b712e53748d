"""request: what the host asks of a step that draws its token."""
