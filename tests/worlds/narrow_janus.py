"""A narrow Janus model with random weights, of exactly the real classes, on the toy world's codes."""

from pathlib import Path
from typing import Any

import torch

from tests.worlds.patch_world import CODES

GRID = 7
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIALS = (BOS, EOS, PAD, "<begin_of_image>", "<end_of_image>", "<image_placeholder>")


def text_tokenizer() -> Any:
    """A byte-level tokenizer with Janus' special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIALS), initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["<|User|>: a photo of a hat\n\n<|Assistant|>:"] * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def narrow_config(tokenizer: Any, *, grid: int = GRID, codes: int = 24, dimension: int = 4) -> Any:
    """Janus' configuration with every width small."""
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            mlp_ratio=2.0,
            image_size=grid * 16,
            num_image_tokens=grid * grid,
            projection_dim=64,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=dimension,
            num_embeddings=codes,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            projection_dim=64,
            image_token_embed_dim=64,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )


def narrow_janus(tokenizer: Any, seed: int = 0, **shape: int) -> Any:
    """A model whose next tokens depend on prompt and tokens alike; its codes are the toy world's."""
    from transformers import JanusForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(narrow_config(tokenizer, **shape))
        with torch.no_grad():
            for name, parameter in model.model.named_parameters():
                if parameter.ndim == 2 and "vision_model" not in name:
                    parameter.mul_(5)  # the usual start makes all logits nearly equal
            weight = model.model.vqmodel.quantize.embedding.weight
            if weight.shape == CODES.shape:
                weight.copy_(torch.from_numpy(CODES) * torch.linspace(1, 2, len(CODES))[:, None])
    return model.eval()


def save_checkpoint(folder: Path, model: Any, tokenizer: Any) -> Path:
    """The model in transformers' layout."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
