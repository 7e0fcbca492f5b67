"""The one exception that is the user's to fix."""


class UserError(ValueError):
    """A bad input: one line that says what was wrong, where, and what would be right."""
