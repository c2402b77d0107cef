"""What FedSpeed does on one GPU, measured in the few minutes that a card is at hand (README.md)."""
