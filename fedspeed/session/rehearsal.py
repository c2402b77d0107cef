"""`--dry-run`: what a run would refuse, found without starting a rank, reading a weight or writing a file."""

import warnings

from fedspeed.errors import FedSpeedError
from fedspeed.session import preflight
from fedspeed.session.inputs import check_inputs, rows_without_libraries
from fedspeed.session.machine import complete
from fedspeed.session.numeric_type import expect
from fedspeed.session.order import Order
from fedspeed.session.standing import Claim, check_best, journal_entry, journal_of


def rehearse(order: Order) -> str:
    """What would run where, in a few lines.

    Raises:
        FedSpeedError: what the run would end with.
    """
    text = preflight.check(order.loaded, order.hostfile)
    order, dtype = expect(order)
    text += f"\ndtype    {dtype}" if dtype else ""
    inner = order
    if order.config.model.dtype == "auto":
        inner = order.settled("fp32")  # the largest type, for what is looked at without memory
        try:
            preflight.check_files(inner.loaded)
        except FedSpeedError as error:
            text += f"\nnote     should it come to fp32: {error}"
    elif dtype:
        preflight.check_files(order.loaded)  # once more, as the ranks do: the type was unknown to `check`
    if order.folder.is_dir():
        claim = Claim()
        claim.take(order.folder)
        claim.drop()
        if not order.fresh and order.config.routing.transport == "tls":
            from fedspeed.session.site import Site

            Site(order.config).check_epoch(order.folder)
        if not order.fresh and (entry := journal_entry(journal_of(order), order)):
            notes = check_inputs(journal_of(order), entry, order.config, rows_without_libraries(order.config))
            text += "".join(f"\nnote     {note}" for note in notes)
            if end := complete(order, entry):
                text += f"\njournal  {order.folder} is complete ({end}, {entry.round} rounds)"
            else:
                check_best(journal_of(order), entry)
                text += f"\njournal  goes on behind round {entry.round} in {order.folder}"
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(action="ignore"):  # of the libraries, about themselves
        inside = preflight.look_inside(inner.loaded)
    return "\n".join(filter(None, (text, inside)))
