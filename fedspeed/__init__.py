"""FedSpeed: federated fine-tuning of language models on DeepSpeed."""

__version__ = "0.1.0"
