"""The errors a user can mend: one line that says what, the value seen, and the next step."""


class ArragError(Exception):
    """Base of every domain error. The command line prints it as one line and exits with 1."""


class BadInputError(ArragError):
    """A value, file or folder that the user named cannot be used."""


class IncompatibleError(ArragError):
    """Two things do not fit each other: a database and a tokenizer, an index and its table."""


class DatabaseBusyError(ArragError):
    """Another process holds the database's lease."""


class LeaseLostError(ArragError):
    """Another process took the database over while this one gave no sign of life."""


class ShardError(ArragError):
    """A whole shard failed, as opposed to single pictures in it."""
