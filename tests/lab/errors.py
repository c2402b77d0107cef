"""What goes wrong in the lab, told in one sentence with a remedy."""


class LabError(Exception):
    """The machine cannot hold a virtual cluster, or the cluster was asked for something it does not have."""
