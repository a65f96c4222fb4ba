"""FAiD: retrieved tokens change a generator's features while it decodes (AR-RAG, section 3.3).

In: for each position K retrieved tokens. Out: nothing; hooks on the self-attention of the augmented
layers add a contribution at the sequence position that predicts (i, j), after self-attention's
residual and before the layer's MLP. The first augmented layer blends the candidates' aligned
embeddings, each later one what the one before made of them.

There are two ways in: `Faid` is an `Augmenter` for a decode loop, one position at a time;
`Faid.whole` gives a forward pass over whole pictures everything at once, as training does. Outside
of them the model is the plain one, and nothing of a picture is left on it afterwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from arrag_runtime.faid.adapter import AdapterSpec, read_adapter, require_fits, spec_of_model
from arrag_runtime.faid.augmenter import Batch, Step
from arrag_runtime.faid.decoder_layer import AugmentedLayer, CandidateTokens, window_cells
from arrag_runtime.faid.patch_blender import FORMS, Folded, Form, Mix
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.neighborhood import MISSING

CANDIDATES = 10
"""K, the candidates per position (AR-RAG, section 4)."""


@dataclass(frozen=True)
class _Prepared:
    """What follows from the weights alone: the aligned embeddings [V + 1, D], the last row zero,
    and the blenders as matrices."""

    table: Tensor
    folded: Sequence[Folded]


@dataclass(frozen=True)
class _Decoding:
    """What the forward passes of a batch share.

    Steps change the tensors in place, so that a captured CUDA graph sees them. cells: what each
    position reads, long [P, n]; memory: for each augmented layer the features [B, P + 2, D] of the
    cells so far, then of a cell that stays zero and of one that nobody reads; write, window: the
    cells that this step fills [1] and reads [n]; chain: what enters each later augmented layer.
    """

    batch: Batch
    prepared: _Prepared
    cells: Tensor
    given: CandidateTokens
    memory: Sequence[Tensor]
    write: Tensor
    window: Tensor
    chain: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Whole:
    """What a forward pass over whole pictures needs; start: the sequence position of token 0."""

    prepared: _Prepared
    cells: Tensor
    given: CandidateTokens
    images: int
    start: int
    chain: dict[int, Tensor] = field(default_factory=dict)


class Faid(nn.Module):
    """Blenders attached to a JanusForConditionalGeneration through forward hooks; an `Augmenter`.

    Its parameters are those of the augmented layers (`layers.L.blender.…` and
    `layers.L.retrieval_layernorm.weight`). `k` candidates are used per position. `form` is how
    blenders compute: "folded", or "convolutions".
    """

    def __init__(
        self, model: Any, spec: AdapterSpec, form: Form = "folded", k: int = CANDIDATES
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise BadInputError(f"unknown form '{form}'; choose one of {', '.join(FORMS)}")
        if k < 1:
            raise BadInputError(f"k is {k}; FAiD needs at least 1 candidate")
        self.spec, self.form, self.k = spec.checked(), form, k
        epsilon = model.config.text_config.rms_norm_eps
        made = {str(layer): AugmentedLayer(self.spec, epsilon) for layer in self.spec.layers}
        self.layers = nn.ModuleDict(made)
        # In tuples, so that neither becomes a submodule of this module (a second time).
        self._augmented, self._model = tuple(made.values()), (model,)
        self._run: _Decoding | _Whole | None = None
        self._known: tuple[object, _Prepared] | None = None
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        decoder = model.model.language_model.layers
        self._hooks = [
            decoder[layer].self_attn.register_forward_hook(self._hook(order), with_kwargs=True)
            for order, layer in enumerate(self.spec.layers)
        ]

    def begin(self, batch: Batch) -> None:
        """Start a batch; rows 0..B-1 of each forward pass are its pictures with prompts."""
        prepared = self._prepare(fold=self.form == "folded")
        table, images = prepared.table, batch.images
        cells = window_cells(batch.height, batch.width, self.spec.hops, table.device)
        positions, near = cells.shape
        none = torch.full((images, self.k), MISSING, device=table.device)
        size = (images, positions + 2, self.spec.width)
        self._run = _Decoding(
            batch,
            prepared,
            cells,
            CandidateTokens.of(none, self.spec.vocabulary, table.dtype),
            memory=[table.new_zeros(size) for _ in self.spec.layers],
            write=cells.new_zeros(1),
            window=cells.new_zeros(near),
        )

    def before_forward(self, step: Step) -> None:
        """Hand over what was retrieved for the position that the next forward pass predicts."""
        run = self._run
        if not isinstance(run, _Decoding):
            raise BadInputError("FAiD was given a step outside of a batch; call begin first")
        tokens = np.full((run.batch.images, self.k), MISSING, np.int64)
        if step.neighbors is not None:
            found = min(self.k, step.neighbors.tokens.shape[1])
            real = np.arange(found) < step.neighbors.count[:, None]
            tokens[:, :found] = np.where(real, step.neighbors.tokens[:, :found], MISSING)
        dtype = run.prepared.table.dtype
        fresh = CandidateTokens.of(torch.from_numpy(tokens), self.spec.vocabulary, dtype)
        run.given.tokens.copy_(fresh.tokens)
        run.given.real.copy_(fresh.real)
        run.given.share.copy_(fresh.share)
        # The prompt's last token, which predicts position 0, goes where nobody reads.
        scratch = len(run.cells) + 1
        run.write.fill_(step.position - 1 if step.position else scratch)
        run.window.copy_(run.cells[step.position])

    def end(self) -> None:
        """Drop everything of the batch; the model decodes plainly again."""
        self._run = None

    @contextmanager
    def whole(self, retrieved: Tensor, height: int, width: int, start: int) -> Iterator[None]:
        """Forward passes over whole pictures, without a cache, for as long as this lasts.

        retrieved: integers [B, h · w, K], `MISSING` for none. The image token of position t is the
        input at sequence position start + t (the last one may be left out), so position t's
        contribution goes to start + t - 1. Rows from B on (guidance) get none.
        """
        if start < 1 or retrieved.shape[1] != height * width:
            raise BadInputError(
                f"{retrieved.shape[1]} positions from sequence position {start} on; FAiD needs"
                f" {height * width} of a {height}x{width} grid, and a prompt before them"
            )
        # In training blenders are folded in every forward pass, so that gradients reach them.
        prepared = self._prepare(fold=self.form == "folded" and not self.training)
        table = prepared.table
        tokens = retrieved.to(table.device, torch.long).flatten(0, 1)
        given = CandidateTokens.of(tokens, self.spec.vocabulary, table.dtype)
        cells = window_cells(height, width, self.spec.hops, table.device)
        self._run = _Whole(prepared, cells, given, len(retrieved), start)
        try:
            yield
        finally:
            self._run = None

    def detach(self) -> None:
        """Take the hooks off and give the model its own weights back, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        for parameter, original in reversed(self._originals):
            parameter.data = original
        self._originals.clear()

    def replace_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Put a value in place of a parameter's of the model, until `detach`."""
        if parameter.shape != value.shape:
            raise BadInputError(
                f"an adapter's weight has shape {tuple(value.shape)}, the model's"
                f" {tuple(parameter.shape)}; use the model it was trained on"
            )
        self._originals.append((parameter, parameter.data))
        parameter.data = value.to(parameter.device, parameter.dtype)

    def _prepare(self, *, fold: bool) -> _Prepared:
        """What follows from the weights, kept for as long as they stay the same."""
        inner = self._model[0].model
        frozen = (*inner.generation_embeddings.parameters(), *inner.generation_aligner.parameters())
        weights = (*self.parameters(), *frozen)
        state = (fold, [(w.data_ptr(), w._version, w.dtype) for w in weights])
        if self._known is None or self._known[0] != state:
            device = frozen[0].device.type
            # It may be used again outside of the inference mode in which pictures are decoded.
            outside = torch.autocast(device, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), outside:
                aligned = inner.generation_aligner(inner.generation_embeddings.weight)
                folded = [layer.folded() for layer in self._augmented] if fold else []
                self._known = (state, _Prepared(pad(aligned, (0, 0, 0, 1)), folded))
        return self._known[1]

    def _blend(self, run: _Decoding | _Whole, order: int, near: Tensor) -> Tensor:
        """An augmented layer's contribution; the candidates for the next are kept in the chain."""
        entering = run.chain[order] if order else embedding(run.given.tokens, run.prepared.table)
        layer, folded = self._augmented[order], None
        if self.form == "folded":
            fixed = run.prepared.folded
            folded = fixed[order] if fixed else layer.blender.fold()
        contribution: Tensor
        contribution, run.chain[order + 1] = layer(near, entering, run.given, folded)
        return contribution

    def _hook(self, order: int) -> Callable[..., Any]:
        """The hook of the order-th augmented layer's self-attention, which gets normed features."""

        def add(_layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            run = self._run
            if run is None:
                return None
            features: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            attended, *rest = output
            if isinstance(run, _Decoding):
                return (self._add_step(run, order, features, attended), *rest)
            return (self._add_whole(run, order, features, attended), *rest)

        return add

    @torch.no_grad()
    def _add_step(self, run: _Decoding, order: int, features: Tensor, attended: Tensor) -> Tensor:
        """Remember the last token's features, and add the contribution for the next position."""
        if len(features) != run.batch.rows:
            raise BadInputError(
                f"a forward pass of {len(features)} rows in a FAiD batch of {run.batch.rows}; begin"
                " the batch with the number of pictures that are decoded"
            )
        memory, images = run.memory[order], run.batch.images
        memory.index_copy_(1, run.write, features[:images, -1:])
        attended[:images, -1] += self._blend(run, order, memory.index_select(1, run.window))
        return attended

    def _add_whole(self, run: _Whole, order: int, features: Tensor, attended: Tensor) -> Tensor:
        """Add every position's contribution, one place before its token."""
        positions = len(run.cells)
        first, last = run.start, run.start + positions
        # The last position's features are in nobody's window, so the input may end before it.
        known = features[: run.images, first:last]
        known = pad(known, (0, 0, 0, positions + 1 - known.shape[1]))
        near = known[:, run.cells].flatten(0, 1)
        contribution = self._blend(run, order, near).view(run.images, positions, -1)
        added = torch.zeros_like(attended)
        added[: run.images, first - 1 : last - 1] = contribution.to(attended.dtype)
        return attended + added


def attach(
    model: Any,
    hops: Sequence[int] = (1, 2),
    blenders: int = 2,
    *,
    mix: Mix = "softmax",
    form: Form = "folded",
    k: int = CANDIDATES,
) -> Faid:
    """Attach fresh blenders to a JanusForConditionalGeneration, on its device and in its dtype.

    The defaults are the paper's best (Figure 7). Raises BadInputError for impossible hops or
    blenders.
    """
    spec = replace(spec_of_model(model), hops=tuple(hops), blenders=blenders, mix=mix)
    embeddings = model.model.generation_embeddings.weight
    return Faid(model, spec, form, k).to(embeddings.device, embeddings.dtype)


def attach_faid(
    model: Any, adapter: Path | str, *, form: Form = "folded", k: int = CANDIDATES
) -> Faid:
    """Attach a trained adapter to the model it was trained for; `detach` undoes it.

    adapter: a file of `arrag train`, or the released checkpoint. LoRA is merged into the model's
    weights, and the tensors that the adapter replaces (generation head, or the whole language
    model) are put in their place. Raises IncompatibleError when the adapter is for another model.
    """
    read = read_adapter(adapter)
    require_fits(read, model, str(adapter))
    embeddings = model.model.generation_embeddings.weight
    faid = Faid(model, read.spec, form, k)
    try:
        faid.load_state_dict(read.layer_tensors())
        faid.to(embeddings.device, embeddings.dtype).eval().requires_grad_(False)
        for name, tensor in read.replacements().items():
            faid.replace_weight(model.get_parameter(name), tensor)
        for name, (down, up) in read.lora_pairs().items():
            weight = model.get_parameter(f"{name}.weight")
            scale = read.spec.lora_alpha / read.spec.lora_rank
            update = scale * (up.to(weight.device).float() @ down.to(weight.device).float())
            faid.replace_weight(weight, weight.data.float() + update)
    except (RuntimeError, AttributeError) as error:
        faid.detach()
        detail = " ".join(str(error).split())
        raise BadInputError(
            f"adapter '{adapter}' does not hold what it says ({detail}); copy or train it again"
        ) from error
    return faid
