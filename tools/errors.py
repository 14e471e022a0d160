"""Errors that an operator can act on."""


class OperatorError(Exception):
    """Something on this machine, in the checkout or in the cluster that the operator can mend; printed without a traceback."""
