"""The base model, its adapter, its tokenizer."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then tells every process which faster kernels it
# might have on a CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
