"""What ends a command in other ways than success or a defect of ours."""


class UserError(ValueError):
    """A user's mistake: the message says what is wrong and what to do instead.

    The commands print it as one line and exit with a non-zero status; any other exception is a
    defect of ours and keeps its traceback.
    """


class Interrupted(Exception):
    """The run was asked to stop, and has left a checkpoint to go on from."""
