"""What can go wrong in a way that the user can put right. Each is a `UserError`: one line and exit code 2."""

from runtime.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be read; the message names the file, the key, what was expected and what was found."""


class TokenizerError(UserError):
    """A tokenizer that cannot be read or exported; the message says what was expected or what differs."""


class RecipeError(UserError):
    """A recipe that cannot be run; the message names the key, what was found and what was expected."""


class TooManySkipped(UserError):
    """More malformed records than the recipe's `malformed_limit`."""


class NothingLearnt(UserError):
    """Every record was skipped."""


class DivergedError(UserError):
    """A gradient is NaN or Inf; the message says how to go on."""
