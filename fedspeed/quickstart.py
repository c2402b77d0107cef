"""The quickstart's base model: a tiny byte-level Llama, pretrained locally so that no network is needed."""

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fedspeed.data.batches import collate
from fedspeed.data.builtin import pretraining_rows
from fedspeed.data.config import DataConfig
from fedspeed.data.encode import Example
from fedspeed.data.prompt_template import PromptTemplate, template_for
from fedspeed.data.rows import Row
from fedspeed.errors import ModelError
from fedspeed.files import check_writable, follow_umask
from fedspeed.log import LOG
from fedspeed.models.tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

# Files of a complete base.
FILES = ("config.json", "model.safetensors", "tokenizer.json")
# 500 steps leave some seeds undertrained.
STEPS = 600
ROWS_PER_STEP = 64
MAX_TOKENS = 64
PEAK_LR = 3e-3
WARMUP_STEPS = 50
BLOCKS = 2


def pretrain(folder: Path, seed: int, blocks: int = BLOCKS) -> None:
    """Write the base as a Hugging Face folder, unless it is there already.

    With two blocks it has 117 000 parameters and takes about 20 s on one core. It learns the skills of the
    built-in task under other instruction words, so that fine-tuning has to teach it the words only.

    Args:
        folder: to write to.
        seed: of the weights and rows.
        blocks: decoder blocks.

    Raises:
        ModelError: the folder cannot be written, or contains other files.
    """
    if all((folder / name).is_file() for name in FILES):
        LOG.info(f"{folder} is there already")
        return
    _check_folder(folder)
    # Libraries import DeepSpeed, which would search for GPUs.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    model = _new_model(tokenizer, blocks)
    _train(model, tokenizer, seed)
    _save(model, tokenizer, folder.resolve())


def _new_model(tokenizer: "PreTrainedTokenizerBase", blocks: int) -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    # At Llama's usual initializer_range of 0.02 a model this narrow learns nothing for the first thousand
    # steps.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _train(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", seed: int) -> None:
    import torch
    from tqdm import tqdm

    rows = tqdm(
        pretraining_rows(seed, STEPS * ROWS_PER_STEP),
        desc="making its rows",
        mininterval=1.0,
        delay=5.0,
        leave=False,
    )
    template = template_for(DataConfig(template="plain", max_tokens=MAX_TOKENS), tokenizer)
    examples = [_encode(row, template) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    with tqdm(range(STEPS), desc="pretraining a tiny base", mininterval=1.0) as steps:
        for step in steps:
            step_examples = examples[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
            batch = collate(step_examples, tokenizer.pad_token_id)
            loss = model(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                labels=torch.from_numpy(batch.labels),
            ).loss
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def _encode(row: Row, template: PromptTemplate) -> Example:
    examples = template.encode(row).examples
    assert examples, "every row of the built-in task has an answer within the limit"
    return examples[0]


def _learning_rate(step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to 2 % of the peak."""
    cosine = max(0.02, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    return PEAK_LR * min((step + 1) / WARMUP_STEPS, cosine)


def _save(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the base to a temporary folder and rename it, so that another run sees a complete base
    or none.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    follow_umask(draft)
    try:
        draft.rename(folder)
    except OSError:
        shutil.rmtree(draft)
        # Another host that shares this disk may have been faster; its base is the same.
        if not all((folder / name).is_file() for name in FILES):
            raise


def _check_folder(folder: Path) -> None:
    """Check, before pretraining, that the base can be written to `folder`.

    Raises:
        ModelError: it cannot.
    """
    try:
        resolved = folder.resolve()
        if resolved.exists() and not resolved.is_dir():
            raise ModelError(f"{folder}: is a file; name a folder for the base")
        if resolved.is_dir() and (names := sorted(entry.name for entry in resolved.iterdir())):
            missing = ", ".join(name for name in FILES if name not in names)
            problem = f"is not empty and holds no base ({names[0]}, ...)"
            if set(FILES) & set(names):
                problem = f"is an incomplete base, without {missing}"
            raise ModelError(f"{folder}: {problem}; delete the folder, or name another one")
        check_writable(resolved.parent)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error
