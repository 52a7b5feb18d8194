"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A user's mistake: the message says what is wrong and what to do instead.

    The commands print it as one line and exit with a non-zero status; any other exception is a
    defect of ours and keeps its traceback.
    """
