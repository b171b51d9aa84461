"""The one exception the user is meant to read."""


class UserError(Exception):
    """Something the caller can put right: a file, an option, a bundle.

    The message is one line that names the thing at fault, what was expected, what was found and, where there is
    one, the next step. Command lines print it as `error: ...` and exit with 2.
    """
