"""Import of a model into a folder that FedSpeed reads: plain safetensors, tokenizer, origin."""
