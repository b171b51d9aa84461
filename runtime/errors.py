"""The one exception the user is meant to read."""


class UserError(Exception):
    """Something the caller can put right: a file, an option, a bundle.

    The message is one line that names the thing at fault, what was expected, what was found and, where there is
    one, the next step. Command lines print it as `error: ...` and exit with 2.
    """


class NoNumbersError(UserError):
    """A decoder's logits that are no numbers, as where values grew beyond float16."""

    def __init__(self):
        super().__init__("the decoder's logits are no numbers: export the bundle in another precision")
