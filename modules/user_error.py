"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend: the message names the value, the place and the remedy.

    Recipes print it as one line and exit with status 2; in a program of one's own it is a ``ValueError``.

    Example::

        raise UserError(f"width {width} is not positive: give a width such as 0.35 or 1.0")
    """
