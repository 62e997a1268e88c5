"""Why a record is not used."""

from rwkv_miss.errors import UserError


class WrongSetting(UserError):
    """A setting does not suit the data. The record itself is right, so leaving it out would mend nothing."""


class LeftOut(UserError):
    """A row is as it should be and teaches nothing: it is counted and left out."""
