"""What FedSpeed does on one GPU, measured in the few minutes that a card is at hand: see README.md beside this file."""
