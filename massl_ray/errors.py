"""The one error that is the user's to mend."""


class UserError(Exception):
    """A mistake in a flag, a file or a data set: one sentence saying what, where and what to do. Commands exit with code 2."""
