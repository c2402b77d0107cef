"""The model families that FedSpeed trains: one module a family, registered in `registry`."""
