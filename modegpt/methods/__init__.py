"""Every compression method behind one protocol (``base.Method``): the paper's, ours, and what they are measured by."""
