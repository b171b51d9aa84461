"""Errors that a user is meant to read."""


class UserError(Exception):
    """Something the caller can put right: a file, an option, a bundle.

    The message is a single line: what is wrong, where, what was expected and, where there is one, the next step.
    Command lines print it as `error: ...` and exit with `exit_code`.
    """

    exit_code = 2

    def __init__(self, message: str):
        # Other libraries' messages and names out of files, which many quote, may hold line breaks
        super().__init__(" ".join(message.splitlines()))


class InvalidLogitsError(UserError):
    """The decoder returned NaN or Inf logits, as where values grew beyond float16."""

    def __init__(self):
        super().__init__("the decoder returned NaN or Inf logits; re-export with a wider --decoder-precision (fp32)")
