"""The one error that is the user's to mend."""

from massl_ray.shown import in_a_line, redacted


class UserError(Exception):
    """A mistake in a flag, a file or a data set: one sentence saying what, where and what to do. Commands exit with code 2.

    What it quotes may be anything: no secrets of addresses and nothing that makes a terminal do things gets through.
    """

    def __init__(self, sentence: str):
        super().__init__(in_a_line(redacted(sentence)))
