"""The script of a client under NVFlare: it trains, or evaluates, for as long as the server asks.

    nvflare_client.py FOLDER

NVFlare runs it in the client's process, on one thread, as there are more clients than cores.
"""

import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Answer the server's tasks until the job is over."""
    import nvflare.client as flare
    import torch

    from benchmarks.compare.outside.trainer import Trainer

    torch.set_num_threads(1)
    flare.init()
    client = int(flare.get_site_name().removeprefix("site-")) - 1
    own = Trainer(folder)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        own.load_state([torch.from_numpy(received.params[name]) for name in own.names])
        if flare.is_train():
            own.train(client, received.current_round)
            flare.send(
                flare.FLModel(
                    params={n: p.detach().numpy().copy() for n, p in zip(own.names, own.trained)},
                    meta={"NUM_STEPS_CURRENT_ROUND": own.weight(client)},  # the weight in the mean
                )
            )
        else:
            loss, tokens = own.held_out([client])
            flare.send(flare.FLModel(metrics={"loss": loss, "tokens": tokens}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
