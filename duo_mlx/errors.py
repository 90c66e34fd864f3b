"""The one exception that callers are expected to show to a person."""


class DuoError(ValueError):
    """Bad input: a single line that names the file or option and says what would be right.

    The command line prints it on stderr and exits with code 2.
    """
