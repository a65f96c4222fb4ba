"""Train the small bundled generator `sample`, and measure it on pictures it never saw.

In: a folder of webdataset tars with .jpg pictures and captions in .json. A tenth of the pictures,
chosen by the hash of their bytes, is held out; training sees the rest. Out: a folder as
`JanusForConditionalGeneration.from_pretrained` reads it, in float16, less the weights of its
tokenizer, which are those of the bundled tokenizer `sample`.

    python benchmarks/train_sample_generator.py encode   --data DATA --tokens tokens.npz
    python benchmarks/train_sample_generator.py train    --tokens tokens.npz --minutes 55 --run RUN
    python benchmarks/train_sample_generator.py export   --run RUN --out FOLDER
    python benchmarks/train_sample_generator.py evaluate --tokens tokens.npz --sheet samples.jpg

A few CPU hours and 1.1 million tokens have to do, so the network does not begin at random:

1. What a token means is in the codebook. The embeddings of image tokens are its rows, and the
   row of a token in the generation head begins as smooth random features of its code, so that
   codes that look alike begin with alike logits; the head's bias begins as the log frequency.
2. Where to look is mostly known. Most attention heads of the first layers begin at one place of
   the neighbourhood (above, above right, two to the left, ...), which rotary positions turn into
   a constant offset of the sequence: biases of queries and keys that agree there.
3. Hidden matrices are trained with Muon, all else with AdamW; one cosine over the minutes given.

Captions are dropped for a tenth of the examples, since guidance needs the model without them.
"""

import argparse
import hashlib
import json
import math
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.tables import is_held_out

HELD_OUT_SHARE = 0.1
GRID = 24
POSITIONS = GRID * GRID
CODES = 4096
SHIPPED = Path(__file__).parents[1] / "arrag_runtime" / "backends" / "weights" / "sample"

Tokens = npt.NDArray[np.uint16]


# --- Data -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """tokens: uint16 [N, 2, 24, 24], each picture and its mirror image; captions [N]; held out [N]."""

    tokens: Tokens
    captions: npt.NDArray[Any]
    held_out: npt.NDArray[np.bool_]
    codebook: npt.NDArray[np.float32]

    @staticmethod
    def read(path: Path) -> "Pictures":
        """The file that `encode` wrote."""
        with np.load(path) as file:
            return Pictures(
                *(file[name] for name in ("tokens", "captions", "held_out", "codebook"))
            )


def encode(data: Path, out: Path) -> dict[str, Any]:
    """Tokens of all pictures and of their mirror images with the bundled tokenizer, in bfloat16."""
    from arrag_runtime.tokenizers import load_tokenizer
    from stages.encode.decode import DecodeSettings, decode_image

    tokenizer = load_tokenizer("sample")
    tokenizer.setup("cpu", precision="bfloat16")
    tokens, captions, held_out = [], [], []
    for path in sorted(data.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar}
            for name in sorted(name for name in members if name.endswith(".jpg")):
                picture = _read(tar, members[name])
                about = json.loads(_read(tar, members[name.replace(".jpg", ".json")]))
                pixels = decode_image(picture, DecodeSettings()).pixels
                both = [
                    tokenizer.encode(side[None]).tokens[0] for side in (pixels, pixels[:, ::-1])
                ]
                tokens.append(np.stack(both))
                captions.append(about["caption"])
                held_out.append(is_held_out(hashlib.sha256(picture).hexdigest(), HELD_OUT_SHARE))
                if len(tokens) % 100 == 0:
                    print(f"{len(tokens)} pictures", flush=True)
    np.savez_compressed(
        out,
        tokens=np.stack(tokens),
        captions=np.array(captions),
        held_out=np.array(held_out),
        codebook=tokenizer.codebook(),
    )
    return {"pictures": len(tokens), "held_out": int(np.sum(held_out))}


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


# --- The text tokenizer ---------------------------------------------------------------------

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN, END, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
SPECIALS = (BOS, EOS, PAD, BEGIN, END, IMAGE)
TEXT_VOCABULARY = 768
LONGEST_TEXT = 40
GUIDANCE, TEMPERATURE = 5.0, 0.85
"""The weight of guidance and the temperature of sampling that the shipped folder asks for."""


def train_text_tokenizer(captions: list[str]) -> Any:
    """A byte-level BPE tokenizer with Janus-Pro's special tokens, fitted to the captions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prompt_of(caption) for caption in captions], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END},
    )


def prompt_of(caption: str) -> str:
    """A caption in Janus-Pro's prompt template, without the token that begins the picture."""
    return f"<|User|>: {caption.strip()}\n\n<|Assistant|>:"


def text_ids(tokenizer: Any, caption: str) -> list[int]:
    """The ids of a prompt: beginning of text, the template, beginning of picture."""
    return [*tokenizer(prompt_of(caption))["input_ids"], tokenizer.convert_tokens_to_ids(BEGIN)]


def shortened(tokenizer: Any, caption: str) -> str:
    """The first words of a caption whose prompt would be longer than `LONGEST_TEXT` tokens."""
    words = caption.split()
    while len(text_ids(tokenizer, " ".join(words))) > LONGEST_TEXT:
        words.pop()
    return " ".join(words)


# --- The network's start --------------------------------------------------------------------

WIDTH, LAYERS, HEADS, INNER = 256, 4, 8, 704
ROPE_THETA = 1000.0
OFFSETS = (
    (GRID - 1, GRID, GRID - 2, 1, 0, 2 * GRID - 1, 2, None),
    (GRID - 1, 0, GRID - 2, GRID, 3 * GRID - 1, None, None, None),
    (GRID - 1, 1, None, None, None, None, None, None),
)
"""Where the heads of the first layers look at the start, in tokens back from the newest one, which
stands left of the one that comes next: 23 is above it, 24 above and to the left, 0 the left itself."""
SHARPNESS = 20.0
CODE_FEATURES = 1.6
"""The scale of random features: at 1.6 the kernel of two unit codes falls to 1/e at distance 0.88."""


def new_config(tokenizer: Any) -> Any:
    """Janus' configuration, narrow; its vision tower, which generation never uses, is a stub."""
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=1024,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            mlp_ratio=1.0,
            projection_dim=WIDTH,
            depth=1,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=64,
            base_channels=32,
            channel_multiplier=[2, 1, 2, 2, 4],
            num_res_blocks=1,
            projection_dim=WIDTH,
            image_token_embed_dim=WIDTH,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )


def new_model(tokenizer: Any, codebook: npt.NDArray[np.float32], counts: Any, seed: int) -> Any:
    """A model that begins as the top of this file says. counts: how often each token occurs [V]."""
    from transformers import JanusForConditionalGeneration

    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(new_config(tokenizer))
    inner = model.model
    codes = torch.from_numpy(codebook)
    with torch.no_grad():
        inner.generation_embeddings.weight.copy_(codes * 8**0.5)
        for layer in (inner.generation_aligner.fc1, *inner.generation_aligner.hidden_layers):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
        head = inner.generation_head
        nn.init.normal_(head.proj_out.weight, std=WIDTH**-0.5)
        phases = codes @ torch.randn(8, WIDTH) * CODE_FEATURES + 2 * math.pi * torch.rand(WIDTH)
        head.vision_head.weight.copy_(torch.cos(phases) * 0.12)
        frequency = torch.from_numpy(counts).float() + 1.0
        head.vision_head.bias.copy_((frequency / frequency.sum()).log())
        inner.language_model.embed_tokens.weight.normal_(std=0.5)
        for layer, offsets in zip(inner.language_model.layers, OFFSETS, strict=False):
            for number, offset in enumerate(offsets):
                if offset is not None:
                    _look_back(layer.self_attn, number, offset)
        for layer in inner.language_model.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.mul_((2 * LAYERS) ** -0.5)
    model.requires_grad_(True)
    inner.vqmodel.requires_grad_(False)
    inner.vision_model.requires_grad_(False)
    inner.aligner.requires_grad_(False)
    return model


def _look_back(attention: Any, head: int, offset: int) -> None:
    """Let a head begin with its attention on the token `offset` before the newest one.

    Rotary positions turn pair f of a query by f's angle times its position, so a query turned back
    by `offset` meets a constant key where both differ by `offset`, and the sum over f peaks there.
    """
    pairs = WIDTH // HEADS // 2
    angles = offset * ROPE_THETA ** (-torch.arange(pairs) / pairs)
    at = head * 2 * pairs
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[at : at + 2 * pairs] *= 0.3
    attention.k_proj.bias[at : at + pairs] = SHARPNESS**0.5
    attention.q_proj.bias[at : at + pairs] = torch.cos(angles) * SHARPNESS**0.5
    attention.q_proj.bias[at + pairs : at + 2 * pairs] = -torch.sin(angles) * SHARPNESS**0.5


# --- Training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """A run: its length, and what a step sees. Rates are those after warm-up."""

    minutes: float
    batch: int = 6
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warm_up: int = 60
    caption_dropout: float = 0.1
    seed: int = 0


def padded(texts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts as (ids [B, T], lengths [B]), filled up with `pad` on the right."""
    lengths = torch.tensor([len(ids) for ids in texts])
    width = int(lengths.max())
    return torch.tensor([ids + [pad] * (width - len(ids)) for ids in texts]), lengths


def logits_of(model: Any, text: Tensor, lengths: Tensor, image: Tensor) -> Tensor:
    """The logits [B, P, V] of every token of the grids [B, P], given prompts [B, T].

    Each row is its prompt, the picture right behind it, and filling at the end, which nothing that
    is predicted can see; so no attention mask is needed.
    """
    both = torch.cat(
        [
            model.get_input_embeddings()(text),
            model.prepare_embeddings_for_image_generation(image[:, :-1]),
        ],
        dim=1,
    )
    at = torch.arange(both.shape[1]).expand(len(text), -1)
    gap = text.shape[1] - lengths[:, None]
    source = torch.where(at < lengths[:, None], at, (at + gap).clamp(max=both.shape[1] - 1))
    both = torch.take_along_dim(both, source[..., None], dim=1)
    states = model.model.language_model(inputs_embeds=both, use_cache=False).last_hidden_state
    wanted = lengths[:, None] - 1 + torch.arange(image.shape[1])
    states = torch.take_along_dim(states, wanted[..., None], dim=1)
    logits: Tensor = model.model.generation_head(states)
    return logits


def losses(model: Any, text: Tensor, lengths: Tensor, image: Tensor) -> Tensor:
    """The negative log likelihood of every token, nats [B, P]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(model, text, lengths, image)
    flat = F.cross_entropy(logits.float().flatten(0, 1), image.flatten(), reduction="none")
    return flat.view(image.shape)


def optimisers(model: Any, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the decoder layers, AdamW for everything else."""
    hidden, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and ".layers." in name and "language_model" in name:
            hidden.append(parameter)
        elif parameter.ndim == 2 and "vision_head" in name:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    return (
        torch.optim.Muon(hidden, lr=settings.muon_rate, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(groups, lr=settings.adam_rate, betas=(0.9, 0.98)),
    )


def set_rates(both: tuple[torch.optim.Optimizer, ...], settings: Settings, factor: float) -> None:
    """Scale both optimisers' rates."""
    for optimiser, rate in zip(both, (settings.muon_rate, settings.adam_rate), strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate * factor


def train(pictures: Pictures, run: Path, settings: Settings) -> dict[str, Any]:
    """Train for the minutes given, in all runs together; goes on from the run's last checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    kept = np.flatnonzero(~pictures.held_out)
    tokens = torch.from_numpy(pictures.tokens.astype(np.int64)).flatten(2)
    tokenizer = _tokenizer_of(run, [str(c) for c in pictures.captions[kept]])
    counts = np.bincount(pictures.tokens[kept].reshape(-1), minlength=CODES)
    model = new_model(tokenizer, pictures.codebook, counts, settings.seed)
    both = optimisers(model, settings)
    step, spent, random = 0, 0.0, np.random.default_rng(settings.seed)
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(both, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        step, spent = saved["step"], saved["spent"]
        random.bit_generator.state = saved["random"]
    order = iter(())
    last_saved = spent
    model.train()
    model.model.vqmodel.eval()
    with (run / "log.jsonl").open("a") as log:
        while spent < settings.minutes * 60:
            began = time.monotonic()
            rows: list[int] = []
            while len(rows) < settings.batch:
                row = next(order, None)
                if row is None:
                    order = iter(random.permutation(kept).tolist())
                else:
                    rows.append(row)
            done = spent / (settings.minutes * 60)
            cosine = 0.5 * (1 + math.cos(math.pi * done))
            set_rates(
                both, settings, min(1.0, (step + 1) / settings.warm_up) * (0.02 + 0.98 * cosine)
            )
            texts = [
                _training_text(tokenizer, str(pictures.captions[r]), random, settings) for r in rows
            ]
            text, lengths = padded(texts, tokenizer.pad_token_id)
            mirrored = torch.from_numpy(random.integers(tokens.shape[1], size=len(rows)))
            loss = losses(model, text, lengths, tokens[torch.tensor(rows), mirrored]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in both:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            step += 1
            spent += time.monotonic() - began
            entry = {"step": step, "loss": round(loss.item(), 4), "norm": round(norm.item(), 3)}
            if step % 200 == 0:
                entry["held_out"] = round(held_out_loss(model, tokenizer, pictures, 32), 4)
            log.write(json.dumps(entry | {"minutes": round(spent / 60, 2)}) + "\n")
            log.flush()
            if spent - last_saved > 180 or spent >= settings.minutes * 60:
                last_saved = spent
                state = {
                    "model": model.state_dict(),
                    "optimisers": [optimiser.state_dict() for optimiser in both],
                    "step": step,
                    "spent": spent,
                    "random": random.bit_generator.state,
                }
                torch.save(state, checkpoint.with_suffix(".part"))
                checkpoint.with_suffix(".part").replace(checkpoint)
    return {"steps": step, "minutes": spent / 60}


def _tokenizer_of(run: Path, captions: list[str]) -> Any:
    """The run's text tokenizer, made on its first start."""
    from transformers import AutoTokenizer

    folder = run / "text_tokenizer"
    if not folder.exists():
        train_text_tokenizer(captions).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _training_text(tokenizer: Any, caption: str, random: Any, settings: Settings) -> list[int]:
    """The prompt of a caption, now and then spelt otherwise, now and then blank as in guidance."""
    if "t shirt" in caption and random.random() < 0.5:
        caption = caption.replace("t shirt", "t-shirt")
    ids = text_ids(tokenizer, shortened(tokenizer, caption))
    if random.random() < settings.caption_dropout:
        ids[1:-1] = [tokenizer.pad_token_id] * (len(ids) - 2)
    return ids


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, pictures: Pictures, limit: int | None) -> float:
    """Mean negative log likelihood of held-out tokens given their captions, nats a token."""
    rows = np.flatnonzero(pictures.held_out)[:limit]
    sums = []
    for start in range(0, len(rows), 8):
        at = rows[start : start + 8]
        texts = [
            text_ids(tokenizer, shortened(tokenizer, str(caption)))
            for caption in pictures.captions[at]
        ]
        image = torch.from_numpy(pictures.tokens[at, 0].reshape(len(at), -1).astype(np.int64))
        sums.append(losses(model, *padded(texts, tokenizer.pad_token_id), image).sum())
    return float(torch.stack(sums).sum() / (len(rows) * POSITIONS))


# --- The folder that ships ------------------------------------------------------------------


def export(run: Path, out: Path) -> dict[str, Any]:
    """Write the run's last checkpoint as a folder: float16, less the picture tokenizer's tensors."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "text_tokenizer")
    saved = torch.load(run / "checkpoint.pt", weights_only=False)
    state = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in saved["model"].items()
        if not name.startswith(("model.vqmodel.", "lm_head."))
    }
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    new_config(tokenizer).save_pretrained(out)
    asked = {"guidance_scale": GUIDANCE, "temperature": TEMPERATURE}
    (out / "generation_config.json").write_text(json.dumps(asked) + "\n")
    save_file(state, out / "model.safetensors", {"format": "pt"})
    size = sum(file.stat().st_size for file in out.iterdir())
    return {"steps": saved["step"], "minutes": saved["spent"] / 60, "bytes": size}


# --- How good it is -------------------------------------------------------------------------

SHOWN = (
    "a photo of a t-shirt",
    "a photo of pants",
    "a photo of a dress",
    "a photo of shoes",
    "a photo of a hat",
    "a photo of Orange",
    "a photo of Red Delicious",
    "a photo of Banana",
    "a photo of Oatly Oat Milk",
    "a photo of Carrots",
    "Night photography, city intersection",
    "Impressionist oil painting, a countryside landscape",
)


def evaluate(pictures: Pictures, folder: Path, sheet: Path | None, seed: int) -> dict[str, Any]:
    """Nats a token on the held-out pictures, beside what counting reaches; and a page of samples."""
    from arrag_runtime import generate
    from arrag_runtime.backends.checkpoint import read_checkpoint
    from arrag_runtime.backends.janus import JanusBackend, janus_model

    checkpoint = read_checkpoint("sample" if folder == SHIPPED else str(folder))
    model = janus_model(checkpoint, torch.float32)
    backend = JanusBackend(
        model,
        checkpoint.tokenizer,
        "sample",
        guidance=checkpoint.guidance,
        temperature=checkpoint.temperature,
    )
    rows = int(pictures.held_out.sum())
    told: dict[str, Any] = {
        "pictures": rows,
        "nats_a_token": round(held_out_loss(model, checkpoint.tokenizer, pictures, None), 4),
        **counted(pictures),
    }
    if sheet is not None:
        made = generate(backend, SHOWN, images=2, seed=seed, batch_size=8)
        page(SHOWN, backend.pixels(made.tokens), sheet)
    return told


def counted(pictures: Pictures) -> dict[str, float]:
    """Nats a token of held-out grids by counting: each token alone, and after its left neighbour.

    Pairs are smoothed with `weight` times the single tokens' share; the best of a few weights on
    these very pictures, which flatters counting a little.
    """
    seen, asked = (pictures.tokens[pictures.held_out == side, 0] for side in (False, True))
    single = np.bincount(seen.reshape(-1), minlength=CODES) + 0.5
    single = single / single.sum()
    pairs = np.zeros((CODES, CODES), np.float32)
    np.add.at(pairs, (seen[:, :, :-1].reshape(-1), seen[:, :, 1:].reshape(-1)), 1)
    totals = pairs.sum(axis=1)
    left, right = asked[:, :, :-1].reshape(-1), asked[:, :, 1:].reshape(-1)
    first = -np.log(single[asked[:, :, 0].reshape(-1)])
    best = min(
        float(
            np.concatenate(
                [
                    first,
                    -np.log(
                        (pairs[left, right] + weight * single[right]) / (totals[left] + weight)
                    ),
                ]
            ).mean()
        )
        for weight in (50, 100, 200, 400, 800, 1600, 3200)
    )
    alone = float(-np.log(single[asked.reshape(-1)]).mean())
    return {"single_tokens": round(alone, 4), "left_neighbour": round(best, 4)}


def page(prompts: tuple[str, ...], pixels: npt.NDArray[np.uint8], out: Path) -> None:
    """Two pictures a prompt, three prompts a row, reduced to 192 pixels."""
    from PIL import Image, ImageDraw, ImageFont

    side, gap, text = 192, 8, 24
    rows = -(-len(prompts) // 3)
    width = 3 * (2 * side + 3 * gap)
    sheet = Image.new("RGB", (width, rows * (side + gap + text) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, prompt in enumerate(prompts):
        row, column = divmod(number, 3)
        x, y = gap + column * (2 * side + 3 * gap), gap + row * (side + gap + text)
        for i in range(2):
            small = Image.fromarray(pixels[2 * number + i]).resize((side, side))
            sheet.paste(small, (x + i * (side + gap), y))
        draw.text((x, y + side + 3), prompt[:52], (63, 63, 70), ImageFont.load_default(13))
    sheet.save(out)


def main() -> None:
    """The four commands at the top of this file."""
    parser = argparse.ArgumentParser(description="Train the bundled generator.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("encode")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--tokens", type=Path, required=True)
    one = commands.add_parser("train")
    one.add_argument("--tokens", type=Path, required=True)
    one.add_argument("--run", type=Path, required=True)
    one.add_argument("--minutes", type=float, default=55.0)
    one.add_argument("--batch", type=int, default=6)
    one.add_argument("--seed", type=int, default=0)
    one = commands.add_parser("export")
    one.add_argument("--run", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one = commands.add_parser("evaluate")
    one.add_argument("--tokens", type=Path, required=True)
    one.add_argument("--model", type=Path, default=SHIPPED)
    one.add_argument("--sheet", type=Path)
    one.add_argument("--seed", type=int, default=0)
    for command in commands.choices.values():
        command.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "encode":
        print(json.dumps(encode(args.data, args.tokens)))
    elif args.command == "train":
        settings = Settings(args.minutes, args.batch, seed=args.seed)
        print(json.dumps(train(Pictures.read(args.tokens), args.run, settings)))
    elif args.command == "export":
        print(json.dumps(export(args.run, args.out)))
    elif args.command == "evaluate":
        told = evaluate(Pictures.read(args.tokens), args.model, args.sheet, args.seed)
        print(json.dumps(told))


if __name__ == "__main__":
    main()
