"""`fs_llm` and `fs_llm_offload`: FederatedScope-LLM (Kuang et al., KDD 2024). It averages all clients' LoRA
factors, as `lora_average` with the rule `avg_factors`; how clients train is in the presets.
"""

from fedspeed.federation.methods.fs_llm.native_size import base64_bytes
from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.units import bytes_text


class FsLlm(LoraAverage):
    """Averaging that tells the size of the original's messages."""

    def original_size(self) -> str:
        """Return the size of a message with all factors that clients train, in fp32."""
        trained = self.layout.without(self.frozen(1))
        size = base64_bytes(dict(zip(trained.names, trained.shapes)), "fp32")
        return f"{bytes_text(size)} in its own messages (base64)"
