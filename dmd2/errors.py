"""Errors meant for the user's eyes."""


class UserError(ValueError):
    """Bad input. The message is one clear line saying what is wrong and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """
