"""An encoder whose layers are csrc's: no work for padding, one call a batch.

    input_ids [B, T], attention_mask [B, T] -> tokens [N] -> csrc -> [N, H] -> [B, T, H]

It stands where the encoder stood, below the same head, and gives what the encoder gave, in float32;
rows of padding are zero. Texts are laid one after the other without padding, and every step, from
the embeddings to the last norm, runs on those rows alone.

Why not nested tensors: torch has few operators for them on a CPU, and each would still be one
pass over memory.
"""

import copy

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import UserError
from .packing import Packed, projection_of


class PackedEncoder(nn.Module):
    """An encoder for inference on a CPU.

    Args:
        base: an encoder of transformers or of fastffn, without head. Its embeddings and its pooler
            are used, its layers are packed; it may be let go afterwards.
        precision: of the weights, "float32", "bfloat16" or "int8"; sums, norms and attention stay
            in float32.

    Raises:
        NotPackable: the encoder has something that csrc does not compute, or the processor does
            not multiply that precision.
    """

    def __init__(self, base: nn.Module, precision: str = "float32"):
        super().__init__()
        self.packed = Packed(base, precision)
        self.config = base.config
        self.embeddings = base.embeddings
        self.projection = projection_of(base)
        self.pooler = getattr(base, "pooler", None)
        self.pooler_activation = getattr(base, "pooler_activation", None)  # ALBERT's
        self._pool = getattr(type(base), "pool", None)  # fastffn's models': it reads the config
        self.position_bias = _PositionBias(base.encoder) if self.packed.relative else None
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of the outputs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def get_input_embeddings(self) -> nn.Module:
        words = getattr(self.embeddings, "word_embeddings", None)
        return self.embeddings.tok_embeddings if words is None else words

    def train(self, mode: bool = True) -> "PackedEncoder":
        if mode:
            raise UserError("this model is optimised for inference; train the one it was made from")
        return super().train(False)

    def _save_to_state_dict(self, *_: object) -> None:
        raise UserError(
            "an optimised model cannot be saved, its weights are packed; "
            "save the model it was made from"
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **others: object,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """As the encoder's own; the mask is [B, T], all tensors are on the CPU. The pooler sees
        zeros where a text does not begin in the first column.

        Raises:
            UserError: hidden states or attentions are asked for, also by the configuration; an
                argument that is not known here; shapes that do not fit, tokens or positions that
                the model does not have.
        """
        wanted = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        for name, asked in wanted.items():
            if asked or (asked is None and getattr(self.config, f"output_{name}", False)):
                raise UserError(
                    f"output_{name}: an optimised model keeps neither hidden states nor "
                    "attentions; ask the model it was made from"
                )
        tasks = others.pop("task_type_ids", None)  # ERNIE's
        for name, value in others.items():
            if value is not None and value is not False:
                raise UserError(f"{name}: an optimised model does not take it; leave it out")
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("input_ids: give either input_ids or inputs_embeds")
        shape = tuple((inputs_embeds if input_ids is None else input_ids).shape[:2])
        self._check_length(shape[1], input_ids is None)
        for name, x in {
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "task_type_ids": tasks,
        }.items():
            if x is not None and tuple(x.shape) not in (shape, (1, shape[1])):
                raise UserError(f"{name}: {list(x.shape)}, expected {list(shape)}")
        for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds):
            if x is not None and x.device.type != "cpu":
                raise UserError(f"the inputs are on {x.device}, the model on the CPU; move them")
        rows = _Rows(shape, attention_mask)
        more = {} if tasks is None else {"task_type_ids": tasks}
        hidden = self._run(
            rows, attention_mask, input_ids, token_type_ids, position_ids, inputs_embeds, more
        )
        hidden = rows.padded(hidden)
        pooled = None
        if self.pooler is not None and self.pooler_activation is not None:
            pooled = self.pooler_activation(self.pooler(hidden[:, 0]))
        elif self.pooler is not None:
            pooled = self.pooler(hidden)
        elif self._pool is not None:
            pooled = self._pool(self, hidden, attention_mask)
        output = BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)
        return output.to_tuple() if return_dict is False else output

    def _run(self, rows: "_Rows", mask, ids, kinds, positions, words, more) -> Tensor:
        known = self.packed.embeddings
        bias = None
        if self.position_bias is not None:
            if rows.gapped:
                raise UserError("attention_mask: has holes, which relative positions cannot skip")
            bias = self.position_bias(rows.shape[1])
        if self.packed.windowed and rows.gapped:
            raise UserError("attention_mask: has holes, which a window cannot skip")
        # Neighbours are told by csrc from positions that count columns.
        if known is None or ids is None or (known.trigram and positions is not None):
            hidden = rows.of(self._embedded(mask, ids, kinds, positions, words, more))
            hidden = hidden.clone(memory_format=torch.contiguous_format)
            places = None
            if self.packed.windowed and positions is not None:  # its layers rotate by them
                places = rows.of(positions.long().expand(rows.shape)).contiguous()
            self.packed.run(hidden, rows.starts, places=places, bias=bias)
            return hidden
        if positions is None and known.by_words is not None:
            real = ids.ne(known.by_words)
            self._check_length(max([1, *real.sum(1).tolist()]), True)
            positions = real.cumsum(1) * real + known.by_words
        elif positions is None and rows.holed:
            positions = torch.arange(rows.shape[1])
        places = None
        if positions is not None:
            places = rows.of(positions.long().expand(rows.shape)).contiguous()
        if kinds is not None:
            kinds = rows.of(kinds.long().expand(rows.shape)).contiguous()
        ids = rows.of(ids.long()).contiguous()
        hidden = torch.empty(len(ids), self.packed.hidden)
        self.packed.run(hidden, rows.starts, ids, places, kinds, bias)
        return hidden

    def _embedded(self, mask, ids, kinds, positions, words, more) -> Tensor:
        """What the layers begin with, [B, T, H], by the model's own modules."""
        given = {"inputs_embeds": words, **more}
        if not self.packed.windowed:
            given["position_ids"] = positions
        if getattr(self.embeddings, "token_type_embeddings", None) is not None:
            given["token_type_ids"] = kinds
        if getattr(self.embeddings, "trigram", False):
            given["attention_mask"] = mask
        given = {name: value for name, value in given.items() if value is not None}
        hidden = self.embeddings(input_ids=ids, **given)
        return (hidden if self.projection is None else self.projection(hidden)).float()

    def _check_length(self, length: int, by_columns: bool) -> None:
        """by_columns: padding counts, too, even where positions count words (csrc knows those)."""
        known = self.packed.embeddings
        if length == 0:
            raise UserError("input_ids: texts of 0 tokens; keep at least one, such as [CLS]")
        most = getattr(self.config, "max_position_embeddings", length)
        if known is not None and known.by_words is not None:
            most = most - known.by_words - 1 if by_columns else length
        if length > most:
            raise UserError(
                f"input_ids: {length} tokens, the model has {most} positions; truncate the text"
            )


class _Rows:
    """Which rows of [B, T] are tokens.

    Args:
        shape: (B, T).
        mask: [B, T], 0 at padding; None: all are tokens. Of four dimensions or in another order of
            texts is refused.

    Attributes:
        starts: int64 [B + 1], where each text's tokens begin.
        holed: a text's tokens are not its first ones.
        gapped: a text's tokens are not next to each other.
    """

    def __init__(self, shape: tuple[int, int], mask: Tensor | None):
        self.shape, self.holed, self.gapped = shape, False, False
        batch, length = shape
        self.index: Tensor | None = None
        if mask is not None:
            if tuple(mask.shape) != shape:
                raise UserError(
                    f"attention_mask: {list(mask.shape)}, expected {list(shape)} with 0 at padding"
                )
            mask = mask != 0
            if not mask.all():
                self.index = mask.flatten().nonzero().flatten()
                self.starts = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
                beginnings = mask[:, 1:] > mask[:, :-1]
                self.holed = bool(beginnings.any())
                self.gapped = bool((beginnings.sum(1) + mask[:, 0] > 1).any())
                return
        self.starts = torch.arange(0, (batch + 1) * length, length)

    def of(self, x: Tensor) -> Tensor:
        """[B, T, ..] -> [N, ..]"""
        x = x.reshape(-1, *x.shape[2:])
        return x if self.index is None else x[self.index]

    def padded(self, x: Tensor) -> Tensor:
        """[N, H] -> [B, T, H], zeros at padding."""
        if self.index is not None:
            batch, length = self.shape
            x = x.new_zeros(batch * length, x.shape[1]).index_copy_(0, self.index, x)
        return x.view(*self.shape, x.shape[1])


class _PositionBias:
    """MPNet's bias of relative positions [heads, T, T], kept for the longest T so far.

    It depends on the difference of two positions, so that of a shorter T is its corner.
    """

    def __init__(self, encoder: nn.Module):
        # Without the layers, whose weights should be let go.
        self.encoder = copy.copy(encoder)
        self.encoder._modules = {"relative_attention_bias": encoder.relative_attention_bias}
        self.bias: Tensor | None = None

    def __call__(self, length: int) -> Tensor:
        bias = self.bias
        if bias is None or bias.shape[-1] < length:
            rows = torch.empty(1, length, 1)
            bias = self.encoder.compute_position_bias(rows)[0].float().contiguous()
            self.bias = bias  # one assignment: callers in other threads see the old or the new
        return bias
