"""FedSpeed beside other methods and other systems: what `fedspeed bench` runs."""
