"""Errors of the lab, each with a remedy."""


class LabError(Exception):
    """The machine cannot run a virtual cluster, or the cluster does not have what was asked for."""
