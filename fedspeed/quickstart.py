"""The quickstart's base model: a tiny byte-level Llama, pretrained on the spot so that a machine without
network has one.
"""

import math
import os
import shutil
from pathlib import Path

from fedspeed.data.batches import collate
from fedspeed.data.builtin import pretraining_rows
from fedspeed.data.encode import encode
from fedspeed.errors import ModelError
from fedspeed.files import check_writable, follow_umask
from fedspeed.log import LOG
from fedspeed.models.tokenizer import byte_tokenizer

FILES = ("config.json", "model.safetensors", "tokenizer.json")  # of a whole base
STEPS, ROWS = 600, 64  # 500 steps leave some seeds undertrained
PEAK_LR = 3e-3
WARMUP = 50


def pretrain(folder: Path, seed: int) -> None:
    """Write the base as a Hugging Face folder (117 000 parameters, about 20 s on one core); leaves a finished
    one alone.

    It learns the built-in task's skills under other instruction words, so that fine-tuning has to teach it
    the words only.
    """
    if all((folder / name).is_file() for name in FILES):
        LOG.info(f"{folder} is there already")
        return
    _check_place(folder)
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # whoever imports DeepSpeed on the way need not look for GPUs
    import torch
    import transformers
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    # At Llama's usual initializer_range of 0.02 a model this narrow learns nothing for the first thousand
    # steps.
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    rows = tqdm(
        pretraining_rows(seed, STEPS * ROWS), desc="making its rows", mininterval=1.0, delay=5.0, leave=False
    )
    examples = [encode(row, tokenizer, "plain", 64) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    with tqdm(range(STEPS), desc="pretraining a tiny base", mininterval=1.0) as steps:
        for step in steps:
            batch = collate(examples[step * ROWS : (step + 1) * ROWS], tokenizer.pad_token_id)
            loss = model(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                labels=torch.from_numpy(batch.labels),
            ).loss
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(
                    (step + 1) / WARMUP, max(0.02, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    folder = folder.resolve()
    part = folder.with_name(
        f".{folder.name}.{os.getpid()}.part"
    )  # a run that starts meanwhile sees a whole base or none
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    follow_umask(part)
    try:
        part.rename(folder)
    except OSError:
        shutil.rmtree(part)
        if not all(
            (folder / name).is_file() for name in FILES
        ):  # else another host that shares this disk was faster; its base is the same
            raise


def _check_place(folder: Path) -> None:
    """Raises ModelError where the base could not be put: found before it is pretrained."""
    try:
        place = folder.resolve()
        if place.exists() and not place.is_dir():
            raise ModelError(f"{folder}: is a file; name a folder for the base")
        if place.is_dir() and (there := sorted(entry.name for entry in place.iterdir())):
            lacks = ", ".join(name for name in FILES if name not in there)
            found = (
                f"is an incomplete base, without {lacks}"
                if set(FILES) & set(there)
                else f"is not empty and holds no base ({there[0]}, ...)"
            )
            raise ModelError(f"{folder}: {found}; delete the folder, or name another one")
        check_writable(place.parent)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error
