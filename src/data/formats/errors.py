"""Errors that say why a record is not used."""

from rwkv_miss.errors import UserError


class WrongSetting(UserError):
    """Setting that does not suit the data. The record itself is right: leaving it out would mend nothing."""


class LeftOut(UserError):
    """Row that is right but teaches nothing: it is counted and left out."""
